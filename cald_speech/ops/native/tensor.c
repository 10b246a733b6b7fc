/* The description of a tensor, which is a field of every op's arguments. */

#include "tensor.h"

EXPORT_FIELDS(cald_tensor, Tensor, TENSOR_FIELDS)
