/* What the kernel alone costs, and clients that cost next to nothing.
 *
 * One static program, because the guest has to run it as well. Every mode prints plain numbers, one
 * sample a line, and fails with a sentence on stderr and status 1. Requests are files of bytes that
 * benchmarks/floor.py prepared: nothing here knows the protocol beyond its frame header.
 *
 *   floor spawn COUNT PROGRAM [ARG...]          ns of each posix_spawn + waitpid
 *   floor exec SOCKET COUNT REQUEST             ns of each exec: connect to the exited frame
 *   floor crowd SOCKET CLIENTS SECONDS REQUEST  "client EXECS" of each, then ns of each exec
 *   floor crowd-spawn CLIENTS SECONDS PROGRAM   "client SPAWNS" of each
 *   floor pour BYTES                            writes them to stdout, 1 MiB at a time
 *   floor relay read|splice PROGRAM [ARG...]    bytes and ns of its stdout, pipe -> socket
 *   floor drain SOCKET REQUEST                  bytes and ns of a process's output
 *   floor send PORT TIMES FLOOR pour BYTES      in a guest: sends them to whoever connects by vsock,
 *                                               by turns itself and out of the pipe of that process
 *   floor receive SOCKET                        bytes and ns until the sender closes
 *   floor pause                                 does nothing until it is killed
 *
 * SOCKET is a path, or PATH,PORT for a vsock device that takes Firecracker's CONNECT line.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    PREFACE = 8,
    HEADER = 8,
    KIND_ERROR = 5,
    KIND_DATA = 6,
    KIND_EXITED = 9,
    REQUEST_MAX = 64 * 1024,
    LAST_MAX = 4096, /* of an exited or error frame's payload, as far as it is looked at */
    BUFFER = 1024 * 1024,
    CLIENTS_MAX = 256,
};

extern char **environ;

static char buffer[BUFFER];
static char request[REQUEST_MAX];
static size_t request_size;

static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "floor: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    exit(1);
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static long number(const char *text, long maximum)
{
    char *end;
    long value = strtol(text, &end, 10);
    if (*end || value < 1 || value > maximum)
        fail("%s: must be a number from 1 to %ld", text, maximum);
    return value;
}

static void write_all(int fd, const char *data, size_t size)
{
    while (size) {
        ssize_t count = write(fd, data, size);
        if (count < 0)
            fail("write: %s", strerror(errno));
        data += count;
        size -= (size_t)count;
    }
}

static void load_request(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t count = fd < 0 ? -1 : read(fd, request, sizeof request);
    if (count <= 0)
        fail("%s: %s", path, strerror(errno));
    request_size = (size_t)count;
    close(fd);
}

/* ── processes ────────────────────────────────────────────────────────────────────────────────── */

static void spawn_and_wait(char **argv)
{
    pid_t pid;
    int status;
    int error = posix_spawn(&pid, argv[0], NULL, NULL, argv, environ);
    if (error)
        fail("%s: %s", argv[0], strerror(error));
    if (waitpid(pid, &status, 0) != pid || status)
        fail("%s ended with wait status %#x", argv[0], status);
}

static void mode_spawn(long count, char **argv)
{
    while (count--) {
        int64_t start = now();
        spawn_and_wait(argv);
        printf("%lld\n", (long long)(now() - start));
    }
}

static void mode_crowd_spawn(long clients, long seconds, char **argv)
{
    int counts[2];
    if (pipe2(counts, O_CLOEXEC))
        fail("pipe: %s", strerror(errno));
    for (long client = 0; client < clients; client++) {
        pid_t pid = fork();
        if (pid < 0)
            fail("fork: %s", strerror(errno));
        if (pid)
            continue;
        int64_t end = now() + seconds * 1000000000LL;
        long done = 0;
        for (; now() < end; done++)
            spawn_and_wait(argv);
        write_all(counts[1], (char *)&done, sizeof done); /* below PIPE_BUF: in one piece */
        _exit(0);
    }
    close(counts[1]);
    long done, answers = 0;
    for (; read(counts[0], &done, sizeof done) == sizeof done; answers++)
        printf("client %ld\n", done);
    while (wait(NULL) > 0)
        ;
    if (answers != clients)
        fail("%ld of %ld clients finished", answers, clients);
}

/* ── connections ──────────────────────────────────────────────────────────────────────────────── */

static int dial(const char *where)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *comma = strchr(where, ',');
    size_t length = comma ? (size_t)(comma - where) : strlen(where);
    if (length >= sizeof address.sun_path)
        fail("%s: longer than a Unix socket's path may be", where);
    memcpy(address.sun_path, where, length);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
        fail("connect %s: %s", where, strerror(errno));
    if (comma) {
        char line[32];
        write_all(fd, line, (size_t)snprintf(line, sizeof line, "CONNECT %s\n", comma + 1));
        for (size_t at = 0;; at++) { /* a byte at a time: the guest's words follow at once */
            if (at == sizeof line || read(fd, line + at, 1) != 1)
                fail("%s: nobody accepts there", where);
            if (line[at] == '\n')
                break;
        }
    }
    return fd;
}

/* What was understood so far of one connection's answer. */
struct answer {
    size_t skip;       /* of the preface */
    char header[HEADER];
    size_t header_have;
    uint32_t left;     /* of the payload */
    int kind;
    char last[LAST_MAX];
    size_t last_have;
    int64_t data;      /* bytes of output */
    int over;
};

static void begin(struct answer *answer)
{
    answer->skip = PREFACE;
    answer->header_have = 0;
    answer->left = 0;
    answer->last_have = 0;
    answer->data = 0;
    answer->over = 0;
}

static void finish_frame(struct answer *answer)
{
    static const char status_zero[] = "\xa4" "code\x00"; /* msgpack: the key "code", the value 0 */
    answer->header_have = 0;
    if (answer->kind == KIND_ERROR)
        fail("the agent refused: %.*s", (int)answer->last_have, answer->last);
    if (answer->kind != KIND_EXITED)
        return;
    if (!memmem(answer->last, answer->last_have, status_zero, sizeof status_zero - 1))
        fail("the process did not end with status 0: %.*s", (int)answer->last_have, answer->last);
    answer->over = 1;
}

static void understand(struct answer *answer, const char *data, size_t size)
{
    while (size && !answer->over) {
        size_t piece;
        if (answer->skip) {
            piece = size < answer->skip ? size : answer->skip;
            answer->skip -= piece;
        } else if (answer->header_have < HEADER) {
            piece = HEADER - answer->header_have;
            piece = size < piece ? size : piece;
            memcpy(answer->header + answer->header_have, data, piece);
            answer->header_have += piece;
            if (answer->header_have == HEADER) {
                const unsigned char *h = (const unsigned char *)answer->header;
                answer->left = (uint32_t)h[0] << 24 | h[1] << 16 | h[2] << 8 | h[3];
                answer->kind = h[4];
                answer->last_have = 0;
                if (!answer->left)
                    finish_frame(answer);
            }
        } else {
            piece = size < answer->left ? size : answer->left;
            if (answer->kind == KIND_DATA) {
                answer->data += (int64_t)piece;
            } else {
                size_t room = sizeof answer->last - answer->last_have;
                size_t kept = piece < room ? piece : room;
                memcpy(answer->last + answer->last_have, data, kept);
                answer->last_have += kept;
            }
            answer->left -= (uint32_t)piece;
            if (!answer->left)
                finish_frame(answer);
        }
        data += piece;
        size -= piece;
    }
}

static int64_t ask(const char *where, struct answer *answer)
{
    int fd = dial(where);
    write_all(fd, request, request_size);
    for (begin(answer); !answer->over;) {
        ssize_t count = read(fd, buffer, sizeof buffer);
        if (count <= 0)
            fail("%s: the connection ended before the process's status", where);
        understand(answer, buffer, (size_t)count);
    }
    int64_t end = now();
    close(fd);
    return end;
}

static void mode_exec(const char *where, long count, const char *request_file)
{
    static struct answer answer;
    load_request(request_file);
    while (count--) {
        int64_t start = now();
        printf("%lld\n", (long long)(ask(where, &answer) - start));
    }
}

static void mode_drain(const char *where, const char *request_file)
{
    static struct answer answer;
    load_request(request_file);
    int64_t start = now();
    int64_t end = ask(where, &answer);
    printf("%lld\n%lld\n", (long long)answer.data, (long long)(end - start));
}

/* ── many at once: one epoll loop, so that the clients take as little of the machine as they can ── */

struct client {
    int fd;
    int64_t start;
    long done;
    struct answer answer;
};

static void begin_client(int epoll, struct client *client, const char *where)
{
    client->start = now();
    client->fd = dial(where);
    write_all(client->fd, request, request_size);
    begin(&client->answer);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = client};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, client->fd, &event))
        fail("epoll_ctl: %s", strerror(errno));
}

static void mode_crowd(const char *where, long clients, long seconds, const char *request_file)
{
    static struct client crowd[CLIENTS_MAX];
    struct epoll_event events[CLIENTS_MAX];
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    int64_t end = now() + seconds * 1000000000LL;
    long busy = clients;
    load_request(request_file);
    for (long at = 0; at < clients; at++)
        begin_client(epoll, &crowd[at], where);
    while (busy) {
        int count = epoll_wait(epoll, events, CLIENTS_MAX, 30000);
        if (count <= 0)
            fail("%ld clients had no answer for 30 s", busy);
        for (int at = 0; at < count; at++) {
            struct client *client = events[at].data.ptr;
            ssize_t size = read(client->fd, buffer, sizeof buffer);
            if (size <= 0)
                fail("%s: the connection ended before the process's status", where);
            understand(&client->answer, buffer, (size_t)size);
            if (!client->answer.over)
                continue;
            int64_t time = now();
            close(client->fd);
            if (time < end) {
                client->done++;
                printf("%lld\n", (long long)(time - client->start));
                begin_client(epoll, client, where);
            } else {
                busy--;
            }
        }
    }
    for (long at = 0; at < clients; at++)
        printf("client %ld\n", crowd[at].done);
}

/* ── output ───────────────────────────────────────────────────────────────────────────────────── */

static void pour(int fd, int64_t size)
{
    for (; size > 0; size -= BUFFER)
        write_all(fd, buffer, size < BUFFER ? (size_t)size : BUFFER);
}

static void print_received(int fd)
{
    int64_t start = now(), total = 0;
    ssize_t count;
    while ((count = read(fd, buffer, sizeof buffer)) > 0)
        total += count;
    printf("%lld\n%lld\n", (long long)total, (long long)(now() - start));
}

/* What an agent has to do at the least: a process's pipe, emptied into a socket. */
static void relay(int fd, int splicing, char **argv)
{
    int output[2];
    pid_t pid;
    posix_spawn_file_actions_t actions;
    if (pipe2(output, O_CLOEXEC))
        fail("pipe: %s", strerror(errno));
    fcntl(output[0], F_SETPIPE_SZ, BUFFER);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, output[1], 1);
    if (posix_spawn(&pid, argv[0], &actions, NULL, argv, environ))
        fail("cannot start %s", argv[0]);
    posix_spawn_file_actions_destroy(&actions);
    close(output[1]);
    for (;;) {
        ssize_t count = splicing ? splice(output[0], NULL, fd, NULL, BUFFER, SPLICE_F_MOVE)
                                 : read(output[0], buffer, sizeof buffer);
        if (count < 0)
            fail("pipe: %s", strerror(errno));
        if (count == 0)
            break;
        if (!splicing)
            write_all(fd, buffer, (size_t)count);
    }
    close(output[0]);
    waitpid(pid, NULL, 0);
}

static void mode_relay(int splicing, char **argv)
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
        fail("socketpair: %s", strerror(errno));
    pid_t sink = fork();
    if (sink < 0)
        fail("fork: %s", strerror(errno));
    if (sink == 0) {
        close(pair[0]);
        print_received(pair[1]);
        exit(0);
    }
    close(pair[1]);
    relay(pair[0], splicing, argv);
    close(pair[0]);
    waitpid(sink, NULL, 0);
}

static int listen_on(long port)
{
    struct sockaddr_vm address = {
        .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = (unsigned)port};
    int listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) ||
        listen(listener, 4))
        fail("vsock port %ld: %s", port, strerror(errno));
    write_all(1, "listening\n", 10);
    return listener;
}

/* By turns: itself, then as the reader of a process that does, then again. */
static void mode_send(long port, long times, char **argv)
{
    int listener = listen_on(port);
    for (long turn = 0; turn < times; turn++) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0)
            fail("accept: %s", strerror(errno));
        if (turn % 2)
            relay(fd, 0, argv);
        else
            pour(fd, number(argv[2], 1L << 40));
        close(fd);
    }
}

static void mode_pause(void)
{
    for (;;)
        pause();
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "";
    signal(SIGPIPE, SIG_IGN);
    if (argc >= 4 && !strcmp(mode, "spawn"))
        mode_spawn(number(argv[2], 1000000), argv + 3);
    else if (argc == 5 && !strcmp(mode, "exec"))
        mode_exec(argv[2], number(argv[3], 1000000), argv[4]);
    else if (argc == 6 && !strcmp(mode, "crowd"))
        mode_crowd(argv[2], number(argv[3], CLIENTS_MAX), number(argv[4], 60), argv[5]);
    else if (argc >= 5 && !strcmp(mode, "crowd-spawn"))
        mode_crowd_spawn(number(argv[2], CLIENTS_MAX), number(argv[3], 60), argv + 4);
    else if (argc == 3 && !strcmp(mode, "pour"))
        pour(1, number(argv[2], 1L << 40));
    else if (argc >= 4 && !strcmp(mode, "relay"))
        mode_relay(!strcmp(argv[2], "splice"), argv + 3);
    else if (argc == 4 && !strcmp(mode, "drain"))
        mode_drain(argv[2], argv[3]);
    else if (argc == 7 && !strcmp(mode, "send"))
        mode_send(number(argv[2], 0x7fffffff), number(argv[3], 1000), argv + 4);
    else if (argc == 3 && !strcmp(mode, "receive"))
        print_received(dial(argv[2]));
    else if (argc == 2 && !strcmp(mode, "pause"))
        mode_pause();
    else
        fail("no such mode; the source lists them");
    return 0;
}
