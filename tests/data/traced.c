/* Ends with 7 while a process of its own traces it, which never waits for it: ptrace(2). */
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <unistd.h>

int main(void)
{
    int pair[2];
    char byte;
    pid_t traced = getpid();

    if (pipe(pair) < 0)
        return 1;
    prctl(PR_SET_PTRACER, -1L, 0, 0, 0);
    if (fork() == 0) {
        setsid();
        if (ptrace(PTRACE_SEIZE, traced, 0, 0) < 0 || write(pair[1], "x", 1) < 0)
            return 2;
        for (;;)
            pause();
    }
    close(pair[1]);
    return read(pair[0], &byte, 1) == 1 ? 7 : 3;
}
