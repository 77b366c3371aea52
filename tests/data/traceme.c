/* traceme SECONDS: has its parent trace it (ptrace(2)), says so, stops, says that it went on once it is
 * continued, lives SECONDS more, and exits with 6. With "exec" before it, it is executed anew first. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc != 2 && argc != 3)
        return 1;
    if (ptrace(PTRACE_TRACEME, 0, NULL, NULL))
        return 2;
    if (argc == 3) {
        execl("/proc/self/exe", argv[0], argv[2], NULL);
        return 3;
    }
    puts("traced");
    fflush(stdout);
    raise(SIGSTOP);
    puts("went on");
    fflush(stdout);
    sleep(atoi(argv[1]));
    return 6;
}
