/* tracer OPTIONS all|first: traces each thread of its parent, or only the first, and neither waits for
 * it nor lets it go: ptrace(2). "traced" on stdout once it does. */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    char path[64];
    struct dirent *entry;
    DIR *threads;

    snprintf(path, sizeof path, "/proc/%d/task", (int)getppid());
    if (argc != 3 || !(threads = opendir(path)))
        return 1;
    while ((entry = readdir(threads))) {
        int thread = atoi(entry->d_name);
        if (thread == 0 || (strcmp(argv[2], "first") == 0 && thread != getppid()))
            continue;
        if (ptrace(PTRACE_SEIZE, thread, 0, strtol(argv[1], NULL, 0)) < 0)
            return 2;
    }
    if (write(1, "traced\n", 7) != 7)
        return 3;
    for (;;)
        pause();
}
