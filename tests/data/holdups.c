/* What programs in a machine do to hold up those who write to its console or look into its /proc.
 * Each stays and says "held" when it is done; as "stopped" it is an ordinary user. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

#define USER 1000

static void
need(int works, const char *what)
{
    if (!works) {
        perror(what);
        exit(1);
    }
}

static void
stay(const char *told)
{
    int said = open(told, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    need(said >= 0, told);
    for (;;)
        pause();
}

static void
fill(int terminal)
{
    static char text[4096];
    fcntl(terminal, F_SETFL, fcntl(terminal, F_GETFL) | O_NONBLOCK);
    memset(text, '.', sizeof text);
    for (int tries = 0; tries < 100; tries++) /* room comes back late, from a worker of the kernel */
        if (write(terminal, text, sizeof text) < 0)
            usleep(1000);
    fcntl(terminal, F_SETFL, fcntl(terminal, F_GETFL) & ~O_NONBLOCK);
}

/* All that is written to /dev/console goes to a terminal that takes nothing (TIOCCONS). */
static void
redirect(const char *told)
{
    struct termios raw;
    int master = posix_openpt(O_RDWR | O_NOCTTY), slave;
    need(master >= 0 && !grantpt(master) && !unlockpt(master), "posix_openpt");
    slave = open(ptsname(master), O_RDWR | O_NOCTTY);
    need(slave >= 0 && !tcgetattr(slave, &raw), "slave");
    cfmakeraw(&raw);
    tcsetattr(slave, TCSANOW, &raw);
    fill(slave);
    need(!ioctl(slave, TIOCCONS), "TIOCCONS");
    stay(told);
}

/* The console's output is stopped, its buffer full, and nobody else may open it. */
static void
stop(const char *told)
{
    need(!setgid(USER) && !setuid(USER), "setuid");
    need(!tcflow(1, TCOOFF), "tcflow");
    need(!ioctl(1, TIOCEXCL), "TIOCEXCL");
    fill(1);
    stay(told);
}

static void
take(const char *path)
{
    struct rlimit most = {1 << 20, 1 << 20};
    setrlimit(RLIMIT_NOFILE, &most);
    getrlimit(RLIMIT_NOFILE, &most);
    most.rlim_cur = most.rlim_max;
    setrlimit(RLIMIT_NOFILE, &most);
    while (open(path, O_RDWR | O_NOCTTY) >= 0)
        ;
    need(errno == ENOSPC, path);
}

/* All terminals that an ordinary user can get: in a namespace of its own, and then the machine's. */
static void
terminals(const char *told)
{
    int apart[2];
    char done;
    need(!setgid(USER) && !setuid(USER) && !pipe(apart), "setuid");
    if (fork() == 0) {
        need(!unshare(CLONE_NEWUSER | CLONE_NEWNS), "unshare");
        need(!mount("own", "/tmp", "devpts", 0, "newinstance,ptmxmode=0666"), "devpts");
        take("/tmp/ptmx");
        need(write(apart[1], "", 1) == 1, "write");
        for (;;)
            pause();
    }
    close(apart[1]);
    if (read(apart[0], &done, 1) != 1)
        fprintf(stderr, "none in a namespace of its own\n");
    take("/dev/ptmx");
    stay(told);
}

static void *
look(void *unused)
{
    struct stat status;
    stat("/proc/x", &status);
    return unused;
}

static char request[64 * 1024];

/* A file system that never answers. Returns its device. */
static int
mount_dead(const char *path)
{
    struct { struct fuse_out_header header; struct fuse_init_out init; } answer = {0};
    char options[128];
    int device = open("/dev/fuse", O_RDWR);
    need(device >= 0, "/dev/fuse");
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0", device);
    need(!mount("dead", path, "fuse", 0, options), "mount");
    need(read(device, request, sizeof request) > 0, "init");
    answer.header.len = sizeof answer;
    answer.header.unique = ((struct fuse_in_header *)request)->unique;
    answer.init.major = FUSE_KERNEL_VERSION;
    answer.init.minor = FUSE_KERNEL_MINOR_VERSION;
    answer.init.max_write = 4096;
    need(write(device, &answer, sizeof answer) == sizeof answer, "answer");
    return device;
}

/* One over /proc, which hangs on itself, so that nobody can kill it. */
static void
cover(const char *told)
{
    pthread_t thread;
    int device = mount_dead("/proc");
    pthread_create(&thread, NULL, look, NULL);
    need(read(device, request, sizeof request) > 0, "lookup");
    need(!kill(1, SIGTERM), "kill"); /* no shell could: it looks into /proc */
    stay(told);
}

/* One over a directory, as a share whose server is gone. It ends the machine when others have met it. */
static void
stall(const char *place)
{
    int mounted[2];
    char done;
    need(!pipe(mounted), "pipe");
    if (fork() == 0) {
        setsid();
        int group = open("/sys/fs/cgroup/cgroup.procs", O_WRONLY); /* a next start kills what is in it */
        need(group >= 0 && write(group, "0", 1) == 1, "cgroup.procs");
        mount_dead(place);
        need(write(mounted[1], "", 1) == 1, "write");
        sleep(3);
        need(!kill(1, SIGTERM), "kill");
        for (;;)
            pause();
    }
    need(read(mounted[0], &done, 1) == 1, "read");
    printf("stalled\n");
    exit(1);
}

int
main(int count, char **words)
{
    need(count == 3, "holdups redirect|stop|terminals|stall|cover PATH");
    signal(SIGHUP, SIG_IGN);
    if (!strcmp(words[1], "redirect"))
        redirect(words[2]);
    if (!strcmp(words[1], "stop"))
        stop(words[2]);
    if (!strcmp(words[1], "terminals"))
        terminals(words[2]);
    if (!strcmp(words[1], "stall"))
        stall(words[2]);
    cover(words[2]);
}
