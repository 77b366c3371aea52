/*
 * What outlives its maker: System V's objects, and POSIX shared memory and queues.
 *
 *   ipc leave NAME         one of each, used, and the end
 *   ipc hold NAME          the same, and it waits for a signal
 *   ipc unused             a queue and a set of semaphores that nobody uses, and the end
 *   ipc segments MIB       that much System V memory, written to, in pieces of 4 MiB
 *   ipc queues             as many queues as there can be, full of empty messages
 *   ipc sets               as many sets of semaphores as there can be
 *
 * The last three say how many they got, and leave all of it.
 */
#include <fcntl.h>
#include <mqueue.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <unistd.h>

static void
need(int fine, const char *what)
{
    if (!fine) {
        perror(what);
        exit(1);
    }
}

static int
segment(size_t size)
{
    int id = shmget(IPC_PRIVATE, size, IPC_CREAT | 0600);
    if (id < 0)
        return 0;
    char *at = shmat(id, NULL, 0);
    need(at != (void *)-1, "shmat");
    memset(at, 1, size);
    need(!shmdt(at), "shmdt");
    return 1;
}

static void
one_of_each(const char *name)
{
    struct {
        long kind;
        char text[1];
    } message = {1, "x"};
    char path[64];
    need(segment(4096), "shmget");
    int queue = msgget(IPC_PRIVATE, IPC_CREAT | 0600);
    need(queue >= 0 && !msgsnd(queue, &message, 1, IPC_NOWAIT), "msgsnd");
    need(semget(IPC_PRIVATE, 3, IPC_CREAT | 0600) >= 0, "semget");
    snprintf(path, sizeof path, "/%s", name);
    need(mq_open(path, O_CREAT | O_RDWR, 0600, NULL) >= 0, "mq_open");
    int fd = shm_open(path, O_CREAT | O_RDWR, 0600);
    need(fd >= 0 && !ftruncate(fd, 4096), "shm_open");
}

static int
full_queue(void)
{
    struct {
        long kind;
    } message = {1};
    int queue = msgget(IPC_PRIVATE, IPC_CREAT | 0600);
    while (queue >= 0 && !msgsnd(queue, &message, 0, IPC_NOWAIT))
        ;
    return queue >= 0;
}

int
main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    const char *more = argc > 2 ? argv[2] : "0";
    int got = 0;
    if (!strcmp(what, "leave") || !strcmp(what, "hold")) {
        one_of_each(more);
        puts("made");
        fflush(stdout);
        if (!strcmp(what, "hold"))
            pause();
        return 0;
    }
    if (!strcmp(what, "unused")) {
        need(msgget(IPC_PRIVATE, IPC_CREAT | 0600) >= 0, "msgget");
        need(semget(IPC_PRIVATE, 1, IPC_CREAT | 0600) >= 0, "semget");
        return 0;
    }
    if (!strcmp(what, "segments"))
        while (got < atoi(more) && segment(4 << 20))
            got += 4;
    else if (!strcmp(what, "queues"))
        while (full_queue())
            got++;
    else if (!strcmp(what, "sets"))
        while (semget(IPC_PRIVATE, 1, IPC_CREAT | 0600) >= 0)
            got++;
    else
        return 2;
    printf("%d\n", got);
    return 0;
}
