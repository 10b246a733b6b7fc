/* How a pass is called: ``pass(arguments, scratch)`` shares the tasks of a call out among threads.

``pass_scratch(arguments)`` says how many bytes of scratch one thread needs; ``scratch`` is as many zeros for each thread,
at a cache line's beginning. Both are made of what the op defines (Arguments, Task, task_count(), task_of()) and the file
(Scratch, take_scratch(), run_task()). Every thread calls ``after_tasks`` once all tasks are done. */

#ifndef CALD_PASS_H
#define CALD_PASS_H

#include "tensor.h"

#define EXPORT_PASS(pass, after_tasks)                                                                              \
    int64_t pass##_scratch(const Arguments *arguments) {                                                            \
        Arena counted = {0};                                                                                        \
        take_scratch(arguments, &counted);                                                                          \
        return counted.used;                                                                                        \
    }                                                                                                               \
    void pass(const Arguments *arguments, char *scratch) {                                                          \
        const int64_t tasks = task_count(arguments), bytes = pass##_scratch(arguments);                             \
        _Pragma("omp parallel num_threads(arguments->threads)")                                                     \
        {                                                                                                           \
            Arena arena = {scratch + thread_number() * bytes, 0};                                                   \
            Scratch s = take_scratch(arguments, &arena);                                                            \
            _Pragma("omp for schedule(dynamic)")                                                                    \
            for (int64_t number = 0; number < tasks; number++) run_task(arguments, task_of(arguments, number), &s); \
            after_tasks(arguments);                                                                                 \
        }                                                                                                           \
    }

INLINE void nothing_more(const void *arguments) { (void)arguments; }

#endif
