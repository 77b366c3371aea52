/* Holds the lock of a pipe of its own: `holder stdin|stdout`, or `holder orphan` for a child that
 * holds stdout after its parent has ended.
 *
 * `holder hidden NAME WAY` holds the stdout of a process of that name, with something in it, and
 * does not show it among its descriptors. WAY "closed": its number leads nowhere; "replaced": it leads
 * to another pipe; "apart": only the thread that holds it has it.
 *
 * `holder again MS` holds its stdout and its stderr for so long each, again and again, with something
 * in them all the time.
 *
 * splice(2) waits with the pipe's mutex held: from a socket on which nothing arrives, or to one that
 * is full. For "stdin", something must be in the pipe behind the first byte. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

static int idle, apart, thread_id, milliseconds;

static void *hold(void *pipe)
{
    if (apart)
        unshare(CLONE_FILES);
    __atomic_store_n(&thread_id, (int)gettid(), __ATOMIC_RELEASE);
    splice(idle, NULL, (int)(long)pipe, NULL, 65536, 0);
    return NULL;
}

static void *hold_again(void *out)
{
    static const char some[1000];
    struct timeval wait = {milliseconds / 1000, milliseconds % 1000 * 1000};
    int pipe_of = (int)(long)out, pair[2];

    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
    fcntl(pipe_of, F_SETPIPE_SZ, 1 << 20);
    while (write(pipe_of, some, sizeof some) > 0)
        splice(pair[0], NULL, pipe_of, NULL, 65536, 0);
    return NULL;
}

/* The stdout of a process of that name, once there is one. */
static int stdout_of(const char *name)
{
    for (;; usleep(10000)) {
        DIR *processes = opendir("/proc");
        struct dirent *entry;
        int found = -1;
        while (found < 0 && (entry = readdir(processes))) {
            char path[64], is[64] = "";
            int pid = atoi(entry->d_name), file;
            snprintf(path, sizeof path, "/proc/%d/comm", pid);
            if (!pid || (file = open(path, O_RDONLY)) < 0)
                continue;
            if (read(file, is, sizeof is - 1) > 0)
                is[strcspn(is, "\n")] = 0;
            close(file);
            snprintf(path, sizeof path, "/proc/%d/fd/1", pid);
            if (!strcmp(is, name))
                found = open(path, O_RDWR);
        }
        closedir(processes);
        if (found >= 0)
            return found;
    }
}

static int splices(int thread)
{
    char path[64], call[16] = "";
    int file;
    snprintf(path, sizeof path, "/proc/self/task/%d/syscall", thread);
    file = open(path, O_RDONLY);
    if (file < 0 || read(file, call, sizeof call - 1) < 0)
        exit(3);
    close(file);
    return atoi(call) == SYS_splice;
}

/* Says "has the pipe", and does the rest when it gets SIGUSR1. */
static void hide(const char *name, const char *way)
{
    pthread_t thread;
    sigset_t go;
    int pipe_of, number, other[2];

    sigemptyset(&go);
    sigaddset(&go, SIGUSR1);
    sigprocmask(SIG_BLOCK, &go, NULL);
    apart = !strcmp(way, "apart");
    pipe_of = stdout_of(name);
    if (pipe(other) < 0 || write(1, "has the pipe\n", 13) < 0)
        exit(3);
    sigwait(&go, &number);
    if (write(pipe_of, "bait", 4) < 0)
        exit(3);
    pthread_create(&thread, NULL, hold, (void *)(long)pipe_of);
    while (!__atomic_load_n(&thread_id, __ATOMIC_ACQUIRE) || !splices(thread_id))
        usleep(1000);
    if (!strcmp(way, "replaced"))
        dup2(other[0], pipe_of);
    else
        close(pipe_of);
    if (write(1, "holds the lock\n", 15) < 0)
        exit(3);
    pthread_join(thread, NULL);
}

int main(int argc, char **argv)
{
    int pair[2];
    char byte;
    const char *what = argc > 1 ? argv[1] : "";

    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) < 0)
        return 1;
    if (!strcmp(what, "stdin")) {
        static char block[4096];
        if (read(0, &byte, 1) != 1)
            return 1;
        fcntl(pair[0], F_SETFL, O_NONBLOCK);
        while (write(pair[0], block, sizeof block) > 0)
            ;
        while (write(pair[0], block, 1) > 0)
            ;
        fcntl(pair[0], F_SETFL, 0);
        splice(0, NULL, pair[0], NULL, 65536, 0);
        return 2;
    }
    idle = pair[0];
    if (!strcmp(what, "hidden") && argc > 3) {
        hide(argv[2], argv[3]);
        return 2;
    }
    if (!strcmp(what, "again") && argc > 2) {
        pthread_t thread;
        milliseconds = atoi(argv[2]);
        pthread_create(&thread, NULL, hold_again, (void *)1L);
        hold_again((void *)2L);
        return 2;
    }
    if (!strcmp(what, "orphan")) {
        int parent = getpid();
        if (fork() > 0)
            return 7;
        while (getppid() == parent)
            usleep(1000);
    }
    splice(pair[0], NULL, 1, NULL, 65536, 0);
    return 2;
}
