/* A disk that fills up, for the verifier: preloaded into a sidecar, it lets writes into one folder take so many bytes more and no more.
 *
 * MESH... variables belong to the sidecar, so these are named otherwise: DISK_FOLDER, the folder; DISK_ROOM, a file of eight bytes that holds how many
 * bytes may still be written there, or a negative number for no limit. Every write counts, one over what is there already too, as on a file system
 * that copies on write. What finds less room than it needs is written in part, the next one fails with ENOSPC: so a disk fills up. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

static _Atomic long long *room;
static const char *folder;
static size_t folder_length;

__attribute__((constructor)) static void begin(void) {
    const char *file = getenv("DISK_ROOM");
    folder = getenv("DISK_FOLDER");
    if (!file || !folder) return;
    folder_length = strlen(folder);
    int fd = open(file, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *at = mmap(NULL, sizeof(long long), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (at != MAP_FAILED) room = at;
}

static int inside(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path);
    return length > (ssize_t)folder_length && !memcmp(path, folder, folder_length) && path[folder_length] == '/';
}

/* How many of so many bytes may be written. */
static size_t take(int fd, size_t wanted) {
    if (!room || atomic_load(room) < 0 || !inside(fd)) return wanted;
    long long left = atomic_load(room);
    for (;;) {
        if (left < 0) return wanted;
        size_t taken = (size_t)left < wanted ? (size_t)left : wanted;
        if (atomic_compare_exchange_weak(room, &left, left - (long long)taken)) return taken;
    }
}

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define FULL(taken, wanted) \
    if (!(taken) && (wanted)) { \
        errno = ENOSPC; \
        return -1; \
    }

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    size_t taken = take(fd, size);
    FULL(taken, size)
    return real(fd, data, taken);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL(pwrite);
    size_t taken = take(fd, size);
    FULL(taken, size)
    return real(fd, data, taken, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    size_t taken = take(fd, size);
    FULL(taken, size)
    return real(fd, data, taken, at);
}
