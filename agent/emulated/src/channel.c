#define _GNU_SOURCE
#include "channel.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define SOCKET_NAME "driver.sock"

/* HIBERNODE_EMULATED_SOCKET, or the folder above this library's own (DIR/lib/libcuda.so.1). */
static int socket_path(char *out, size_t capacity)
{
    const char *configured = getenv("HIBERNODE_EMULATED_SOCKET");
    if (configured && *configured)
        return snprintf(out, capacity, "%s", configured) < (int)capacity ? 0 : -1;
    Dl_info info;
    char library[PATH_MAX];
    if (!dladdr((void *)socket_path, &info) || !info.dli_fname || !realpath(info.dli_fname, library))
        return -1;
    for (int up = 0; up < 2; up++) {
        char *slash = strrchr(library, '/');
        if (!slash)
            return -1;
        *slash = 0;
    }
    return snprintf(out, capacity, "%s/" SOCKET_NAME, library) < (int)capacity ? 0 : -1;
}

/* Reach a path longer than sun_path through its folder's descriptor. */
static int socket_address(const char *path, struct sockaddr_un *address, int *folder)
{
    *folder = -1;
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    if (strlen(path) < sizeof address->sun_path) {
        strcpy(address->sun_path, path);
        return 0;
    }
    char parent[PATH_MAX];
    const char *slash = strrchr(path, '/');
    if (!slash || (size_t)(slash - path) >= sizeof parent)
        return -1;
    memcpy(parent, path, (size_t)(slash - path));
    parent[slash - path] = 0;
    *folder = open(parent, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (*folder < 0)
        return -1;
    int n = snprintf(address->sun_path, sizeof address->sun_path, "/proc/self/fd/%d/%s", *folder, slash + 1);
    return n < (int)sizeof address->sun_path ? 0 : -1;
}

int emu_connect(void)
{
    char path[PATH_MAX];
    struct sockaddr_un address;
    int folder = -1;
    if (socket_path(path, sizeof path) || socket_address(path, &address, &folder)) {
        if (folder >= 0)
            close(folder);
        return -1;
    }
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    int rc = -1;
    if (fd >= 0) {
        do
            rc = connect(fd, (struct sockaddr *)&address, sizeof address);
        while (rc < 0 && errno == EINTR);
    }
    if (folder >= 0)
        close(folder);
    if (rc < 0 && fd >= 0) {
        close(fd);
        fd = -1;
    }
    return fd;
}

int emu_send(int fd, const struct emu_msg *msg, const void *payload, size_t bytes)
{
    struct iovec parts[2] = {{(void *)msg, sizeof *msg}, {(void *)payload, bytes}};
    struct msghdr header = {.msg_iov = parts, .msg_iovlen = bytes ? 2 : 1};
    ssize_t sent;
    do
        sent = sendmsg(fd, &header, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent == (ssize_t)(sizeof *msg + bytes) ? 0 : -1;
}

long emu_receive(int fd, struct emu_msg *msg, void *payload, size_t capacity, int *fds, int *fd_count)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * EMU_MAX_FDS)];
    } control;
    struct iovec parts[2] = {{msg, sizeof *msg}, {payload, capacity}};
    struct msghdr header = {.msg_iov = parts, .msg_iovlen = capacity ? 2 : 1};
    if (fds) {
        header.msg_control = control.bytes;
        header.msg_controllen = sizeof control.bytes;
    }
    ssize_t got;
    do
        got = recvmsg(fd, &header, MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    if (fd_count)
        *fd_count = 0;
    for (struct cmsghdr *c = fds ? CMSG_FIRSTHDR(&header) : NULL; c && got > 0; c = CMSG_NXTHDR(&header, c)) {
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            *fd_count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            memcpy(fds, CMSG_DATA(c), (size_t)*fd_count * sizeof(int));
        }
    }
    if (got < (ssize_t)sizeof *msg || (header.msg_flags & MSG_TRUNC))
        return -1;
    return got - (long)sizeof *msg;
}

long emu_call(int fd, struct emu_msg *msg, const void *out, size_t out_bytes, void *in, size_t in_capacity)
{
    if (emu_send(fd, msg, out, out_bytes))
        return -1;
    return emu_receive(fd, msg, in, in_capacity, NULL, NULL);
}
