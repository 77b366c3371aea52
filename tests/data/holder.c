/* Holds the lock of a pipe of its own: `holder stdin|stdout`, or `holder orphan` for a child that
 * holds stdout after its parent has ended.
 *
 * splice(2) waits with the pipe's mutex held: from a socket on which nothing arrives, or to one that
 * is full. For "stdin", something must be in the pipe behind the first byte. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

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
