/* A structure that C and Python share is listed once here, as FIELD(type, name) for each field: from the list come the
structure and its description, with which Python compares its own (check_fields() of call.py). */

#ifndef CALD_FIELDS_H
#define CALD_FIELDS_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    const char *name; /* NULL after the last field, with the size of all */
    int64_t offset, size;
} Field;

#define DECLARED(type, name) type name;
#define DESCRIBED(type, name) {#name, offsetof(Described, name), sizeof(type)},
#define EXPORT_FIELDS(exported_as, Structure, FIELDS)                                   \
    const Field *exported_as##_fields(void) {                                           \
        typedef Structure Described;                                                    \
        static const Field fields[] = {FIELDS(DESCRIBED) {NULL, 0, sizeof(Described)}}; \
        return fields;                                                                  \
    }

#endif
