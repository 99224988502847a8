/* Between a program and the C library: counts the calls that change files below one
   folder and, at the N-th of them, does what it was told to: send a signal, write only
   half and send a signal, fail, or write a bit that is another. To be preloaded. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { NONE, SIGNAL, HALF, FAIL, FLIP };

static char folder[4096], only[32], unknown[32];
static int action, value, log_to = -1;
static long when;
static atomic_long count;

/* `calls` is the name of the only call that counts, or empty; `without` that of one that
   the system is not to know. `at` of 0 is never. Each call that counts is noted in `log`. */
void faults_arm(const char *below, const char *calls, const char *without, long at, int what,
                int number, int log)
{
    strncpy(unknown, without, sizeof unknown - 1);
    strncpy(folder, below, sizeof folder - 1);
    strncpy(only, calls, sizeof only - 1);
    action = what, value = number, when = at, log_to = log;
    atomic_store(&count, 0);
}

static int reached(const char *call, const char *path, int descriptor)
{
    char link[64], name[4096], line[8300];
    if (!folder[0])
        return NONE;
    if (!path) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        ssize_t length = readlink(link, name, sizeof name - 1);
        name[length < 0 ? 0 : length] = 0;
        path = name;
    }
    if (strncmp(path, folder, strlen(folder)) || (only[0] && strcmp(only, call)))
        return NONE;
    if (log_to >= 0) {
        int length = snprintf(line, sizeof line, "%s %s\n", call, path);
        if (write(log_to, line, length) != length)
            _exit(99);
    }
    long number = atomic_fetch_add(&count, 1) + 1;
    return number == when ? action : NONE;
}

/* Do what is to be done before the call itself; true if the call is to fail. */
static int fails(const char *call, const char *path, int descriptor)
{
    if (!strcmp(call, unknown)) {
        errno = EOPNOTSUPP;
        return 1;
    }
    int what = reached(call, path, descriptor);
    if (what == SIGNAL || what == HALF)
        kill(getpid(), value);
    if (what == FAIL)
        errno = value;
    return what == FAIL;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                    \
    int name(const char *path, int flags, ...)                        \
    {                                                                 \
        va_list rest;                                                 \
        va_start(rest, flags);                                        \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;     \
        va_end(rest);                                                 \
        const char *call = flags & O_CREAT ? "open" : "look";         \
        if ((flags & O_CREAT || !strcmp(only, call)) && fails(call, path, -1)) \
            return -1;                                                \
        return NEXT(name)(path, flags, mode);                         \
    }
OPEN(open)
OPEN(open64)

#define PWRITE(name)                                                  \
    ssize_t name(int fd, const void *data, size_t size, off_t place)  \
    {                                                                 \
        int what = reached("write", NULL, fd);                        \
        if (what == FAIL) {                                           \
            errno = value;                                            \
            return -1;                                                \
        }                                                             \
        if (what == SIGNAL)                                           \
            kill(getpid(), value);                                    \
        char *flipped = what == FLIP && size ? malloc(size) : NULL;   \
        if (flipped) {                                                \
            size_t bit = (size_t)value % (8 * size);                  \
            data = memcpy(flipped, data, size);                       \
            flipped[bit / 8] ^= 1 << bit % 8;                         \
        }                                                             \
        ssize_t done = NEXT(name)(fd, data, what == HALF ? (size + 1) / 2 : size, place); \
        free(flipped);                                                \
        if (what == HALF)                                             \
            kill(getpid(), value);                                    \
        return done;                                                  \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define FALLOCATE(name)                                               \
    int name(int fd, off_t from, off_t size)                          \
    {                                                                 \
        if (fails("fallocate", NULL, fd))                             \
            return errno;                                             \
        return NEXT(name)(fd, from, size);                            \
    }
FALLOCATE(posix_fallocate)
FALLOCATE(posix_fallocate64)

int fsync(int fd) { return fails("fsync", NULL, fd) ? -1 : NEXT(fsync)(fd); }

int rename(const char *from, const char *to)
{
    return fails("rename", from, -1) ? -1 : NEXT(rename)(from, to);
}

int renameat2(int a, const char *from, int b, const char *to, unsigned flags)
{
    return fails("exchange", from, -1) ? -1 : NEXT(renameat2)(a, from, b, to, flags);
}

int mkdir(const char *path, mode_t mode)
{
    return fails("mkdir", path, -1) ? -1 : NEXT(mkdir)(path, mode);
}

int chmod(const char *path, mode_t mode)
{
    return fails("chmod", path, -1) ? -1 : NEXT(chmod)(path, mode);
}

int unlink(const char *path) { return fails("unlink", path, -1) ? -1 : NEXT(unlink)(path); }
