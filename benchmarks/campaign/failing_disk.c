/* A disk that fails on request, for LD_PRELOAD: counts the calls that change files below a folder, and ends one of them
 * in an error or in a SIGKILL of the process.
 *
 * FAILING_DISK_FOLDER is the folder, FAILING_DISK_CONTROL a file with a `struct control`, which the campaign maps too,
 * and FAILING_DISK_SYNCED a file that gets a line "inode size" at every fsync: what a power cut would leave.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct control {
    int64_t count;    /* calls so far */
    int64_t fail_at;  /* the call that fails, from 1; 0: none */
    int32_t error;    /* the errno; 0: SIGKILL */
    int32_t lasting;  /* whether all later calls fail too, as on a full disk */
    int32_t torn;     /* whether a write that is killed leaves its first half */
};

static struct control *control;
static const char *folder, *synced;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAILING_DISK_CONTROL");
    folder = getenv("FAILING_DISK_FOLDER");
    synced = getenv("FAILING_DISK_SYNCED");
    int file = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR) : -1;
    if (file < 0 || !folder) return;
    void *mapped = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (mapped != MAP_FAILED) control = mapped;
}

static int below_folder(const char *path) {
    size_t length = strlen(folder);
    return strncmp(path, folder, length) == 0 && path[length] == '/';
}

static int watched_file(int file) {
    char link[64], path[4096];
    if (!control) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below_folder(path);
}

static int watched_path(const char *path) {
    char here[4096];
    if (!control) return 0;
    return below_folder(path[0] == '/' ? path : getcwd(here, sizeof here) ? strcat(here, "/") : "");
}

static int fails(void) { /* counts a call; 1: it is to fail */
    int64_t call = __sync_add_and_fetch(&control->count, 1);
    int64_t at = control->fail_at;
    return at && (call == at || (control->lasting && call > at));
}

static int refuse(void) { /* ends the call, or the process */
    if (!control->error) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
    errno = control->error;
    return -1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define WRITING(name, parameters, call, half)                  \
    ssize_t name parameters {                                  \
        if (watched_file(file) && fails()) {                   \
            if (!control->error && control->torn) half;        \
            return refuse();                                   \
        }                                                      \
        return REAL(name) call;                                \
    }

WRITING(write, (int file, const void *data, size_t size), (file, data, size), REAL(write)(file, data, size / 2))
WRITING(pwrite, (int file, const void *data, size_t size, off_t at), (file, data, size, at),
        REAL(pwrite)(file, data, size / 2, at))
WRITING(pwrite64, (int file, const void *data, size_t size, off64_t at), (file, data, size, at),
        REAL(pwrite64)(file, data, size / 2, at))
WRITING(writev, (int file, const struct iovec *parts, int count), (file, parts, count),
        REAL(writev)(file, parts, count / 2))

static int sync_with(int (*sync)(int), int file) {
    if (!watched_file(file)) return sync(file);
    if (fails()) return refuse();
    int result = sync(file);
    struct stat found;
    int log = synced ? (int)syscall(SYS_openat, AT_FDCWD, synced, O_WRONLY | O_APPEND | O_CREAT, 0600) : -1;
    if (log >= 0) {
        if (fstat(file, &found) == 0) dprintf(log, "%llu %lld\n", (unsigned long long)found.st_ino, (long long)found.st_size);
        close(log);
    }
    return result;
}

int fsync(int file) { return sync_with(REAL(fsync), file); }
int fdatasync(int file) { return sync_with(REAL(fdatasync), file); }

int rename(const char *old, const char *new) {
    return watched_path(new) && fails() ? refuse() : REAL(rename)(old, new);
}

int renameat(int from, const char *old, int to, const char *new) {
    return watched_path(new) && fails() ? refuse() : REAL(renameat)(from, old, to, new);
}

/* Removing needs no room: such a call is a moment for a SIGKILL, and never an error. */
int unlink(const char *path) {
    return watched_path(path) && fails() && !control->error ? refuse() : REAL(unlink)(path);
}

#define OPENING(name, parameters, call)                                         \
    int name parameters {                                                       \
        mode_t mode = 0;                                                        \
        if (flags & O_CREAT) {                                                  \
            va_list rest;                                                       \
            va_start(rest, flags);                                              \
            mode = va_arg(rest, mode_t);                                        \
            va_end(rest);                                                       \
            if (watched_path(path) && fails()) return refuse();                 \
        }                                                                       \
        return REAL(name) call;                                                 \
    }

OPENING(open, (const char *path, int flags, ...), (path, flags, mode))
OPENING(open64, (const char *path, int flags, ...), (path, flags, mode))
OPENING(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode))
OPENING(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode))
