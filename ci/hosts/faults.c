/* Preloaded into every program of a host: has one file operation of one program go wrong.
 *
 * All of them share a page, `/dev/shm/faults`, in which `Machine.fault` writes what is to happen, and to
 * what. Operations that fit are counted there; at the one with the wanted number the program is
 * sent a signal (SIGKILL; SIGSTOP, which holds it until SIGCONT), or the operation fails, or that and
 * all that follow.
 *
 * What the C library does inside of itself (the writes of stdio, for one) and programs that are linked statically
 * are not seen; of the programs that a run uses, none is.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define LASTING 1000

/* its layout is also that of PAGE in machine.py */
static struct page {
    uint32_t count;     /* how many fitting operations there were */
    uint32_t number;    /* which of them goes wrong; none: 0 */
    int32_t act;        /* a signal, negative; or an error's number; or that and LASTING, if it is the disk's from then on */
    int32_t process;    /* whose operation went wrong; none yet: 0 */
    char program[32];   /* how the program is called; nothing happens if it is empty */
    char words[128];    /* a part of its command line */
    char path[128];     /* a part of the operation's path */
    char report[1024];  /* what went wrong */
} *page;

__attribute__((constructor)) static void map_page(void)
{
    int file = open("/dev/shm/faults", O_RDWR | O_CLOEXEC);
    if (file < 0)
        return;
    void *mapped = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (mapped != MAP_FAILED)
        page = mapped;
}

static void command_line(char *text, size_t size)
{
    int file = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t length = file < 0 ? 0 : read(file, text, size - 1);
    if (file >= 0)
        close(file);
    for (ssize_t i = 0; i < length; i++)
        if (!text[i])
            text[i] = ' ';
    text[length < 0 ? 0 : length] = 0;
}

static int is_one_of(const char *text, const char *const *beginnings)
{
    for (; *beginnings; beginnings++)
        if (!strncmp(text, *beginnings, strlen(*beginnings)))
            return 1;
    return 0;
}

/* Whether the disk, on which all programs but systemd's work, is full or read-only since the fault was met. */
static int lasts(const char *name, const char *path)
{
    static const char *const elsewhere[] = {"/dev/", "/proc/", "/run/", "/sys/", "/tmp/", "/var/run/", NULL};
    static const char *const systemd[] = {"systemd", "(", "dbus", NULL};
    static const char *const frugal[] = {"unlink", "rmdir", "remove", "rename", "truncate", "ftruncate", "chmod", "fchmod",
                                         "utime", "futime", "fsync", "fdatasync", NULL};
    if (!page || page->act < LASTING || !page->process || !path || is_one_of(path, elsewhere))
        return 0;
    int error = page->act - LASTING;
    if (is_one_of(program_invocation_short_name, systemd) || (error == ENOSPC && is_one_of(name, frugal)))
        return 0;
    errno = error;
    return 1;
}

/* Whether an operation fails; `errno` says how then. */
static int fails(const char *name, const char *path)
{
    if (lasts(name, path))
        return 1;
    if (!page || !page->program[0] || !path || strcmp(page->program, program_invocation_short_name))
        return 0;
    if (!strncmp(path, "/dev/", 5) || !strncmp(path, "/proc/", 6) || !strstr(path, page->path))
        return 0;
    int before = errno;
    char words[4096];
    command_line(words, sizeof words);
    errno = before;
    if (!strstr(words, page->words))
        return 0;
    if (__atomic_add_fetch(&page->count, 1, __ATOMIC_SEQ_CST) != page->number)
        return 0;
    size_t length = strlen(words);
    snprintf(page->report, sizeof page->report, "%s %.180s (%s)", name, path, words + (length > 800 ? length - 800 : 0));
    int act = page->act;
    __atomic_store_n(&page->process, getpid(), __ATOMIC_SEQ_CST);
    if (act < 0)
        raise(-act);
    errno = act >= LASTING ? act - LASTING : act > 0 ? act : before;
    return act > 0;
}

/* The path of an open file, if it is one on a disk. */
static const char *of(int file)
{
    static __thread char path[4096];
    char link[32];
    struct stat status;
    int before = errno;
    ssize_t length = -1;
    if (page && page->program[0] && !fstat(file, &status) && (S_ISREG(status.st_mode) || S_ISDIR(status.st_mode))) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", file);
        length = readlink(link, path, sizeof path - 1);
    }
    errno = before;
    if (length < 0)
        return NULL;
    path[length] = 0;
    return path;
}

#define REAL(type, name, parameters) \
    static type (*real) parameters; \
    if (!real) \
        real = (type(*) parameters)dlsym(RTLD_NEXT, #name)

#define OPERATION(type, failed, name, path, parameters, arguments) \
    type name parameters \
    { \
        if (fails(#name, path)) \
            return failed; \
        REAL(type, name, parameters); \
        return real arguments; \
    }

#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || (flags) & (O_CREAT | O_TRUNC))

#define OPEN(name, parameters, arguments) \
    int name parameters \
    { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        if (WRITES(flags) && fails(#name, path)) \
            return -1; \
        REAL(int, name, parameters); \
        return real arguments; \
    }

OPEN(open, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode))
OPEN(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode))
/* what the macros of _FORTIFY_SOURCE call */
OPERATION(int, -1, __open_2, WRITES(flags) ? path : NULL, (const char *path, int flags), (path, flags))
OPERATION(int, -1, __open64_2, WRITES(flags) ? path : NULL, (const char *path, int flags), (path, flags))
OPERATION(int, -1, __openat_2, WRITES(flags) ? path : NULL, (int at, const char *path, int flags), (at, path, flags))
OPERATION(int, -1, __openat64_2, WRITES(flags) ? path : NULL, (int at, const char *path, int flags), (at, path, flags))
OPERATION(int, -1, creat, path, (const char *path, mode_t mode), (path, mode))
OPERATION(int, -1, creat64, path, (const char *path, mode_t mode), (path, mode))
OPERATION(int, -1, mkstemp, path, (char *path), (path))
OPERATION(int, -1, mkstemp64, path, (char *path), (path))
OPERATION(int, -1, mkostemp, path, (char *path, int flags), (path, flags))
OPERATION(int, -1, mkostemp64, path, (char *path, int flags), (path, flags))
OPERATION(char *, NULL, mkdtemp, path, (char *path), (path))
OPERATION(FILE *, NULL, fopen, strpbrk(mode, "wa+") ? path : NULL, (const char *path, const char *mode), (path, mode))
OPERATION(FILE *, NULL, fopen64, strpbrk(mode, "wa+") ? path : NULL, (const char *path, const char *mode), (path, mode))

OPERATION(ssize_t, -1, write, of(file), (int file, const void *data, size_t size), (file, data, size))
OPERATION(ssize_t, -1, writev, of(file), (int file, const struct iovec *parts, int count), (file, parts, count))
OPERATION(ssize_t, -1, pwrite, of(file), (int file, const void *data, size_t size, off_t place), (file, data, size, place))
OPERATION(ssize_t, -1, pwrite64, of(file), (int file, const void *data, size_t size, off64_t place), (file, data, size, place))
OPERATION(ssize_t, -1, sendfile, of(file), (int file, int source, off_t *place, size_t size), (file, source, place, size))
OPERATION(ssize_t, -1, sendfile64, of(file), (int file, int source, off64_t *place, size_t size), (file, source, place, size))
OPERATION(ssize_t, -1, copy_file_range, of(file), (int source, off64_t *from, int file, off64_t *to, size_t size, unsigned flags),
          (source, from, file, to, size, flags))
OPERATION(int, -1, ftruncate, of(file), (int file, off_t size), (file, size))
OPERATION(int, -1, ftruncate64, of(file), (int file, off64_t size), (file, size))
OPERATION(int, -1, truncate, path, (const char *path, off_t size), (path, size))
OPERATION(int, -1, truncate64, path, (const char *path, off64_t size), (path, size))
OPERATION(int, -1, fsync, of(file), (int file), (file))
OPERATION(int, -1, fdatasync, of(file), (int file), (file))
OPERATION(int, -1, fchmod, of(file), (int file, mode_t mode), (file, mode))
OPERATION(int, -1, futimens, of(file), (int file, const struct timespec times[2]), (file, times))

OPERATION(int, -1, chmod, path, (const char *path, mode_t mode), (path, mode))
OPERATION(int, -1, fchmodat, path, (int at, const char *path, mode_t mode, int flags), (at, path, mode, flags))
OPERATION(int, -1, utimensat, path, (int at, const char *path, const struct timespec times[2], int flags), (at, path, times, flags))
OPERATION(int, -1, rename, to, (const char *from, const char *to), (from, to))
OPERATION(int, -1, renameat, to, (int at, const char *from, int there, const char *to), (at, from, there, to))
OPERATION(int, -1, renameat2, to, (int at, const char *from, int there, const char *to, unsigned flags), (at, from, there, to, flags))
OPERATION(int, -1, link, to, (const char *from, const char *to), (from, to))
OPERATION(int, -1, linkat, to, (int at, const char *from, int there, const char *to, int flags), (at, from, there, to, flags))
OPERATION(int, -1, symlink, to, (const char *from, const char *to), (from, to))
OPERATION(int, -1, symlinkat, to, (const char *from, int there, const char *to), (from, there, to))
OPERATION(int, -1, unlink, path, (const char *path), (path))
OPERATION(int, -1, unlinkat, path, (int at, const char *path, int flags), (at, path, flags))
OPERATION(int, -1, remove, path, (const char *path), (path))
OPERATION(int, -1, rmdir, path, (const char *path), (path))
OPERATION(int, -1, mkdir, path, (const char *path, mode_t mode), (path, mode))
OPERATION(int, -1, mkdirat, path, (int at, const char *path, mode_t mode), (at, path, mode))
