/* What programs try against the machine they run in. Prints "NAME RESULT" for each: 0, or the name
 * of the error. `attacks` as root tries what root can, then becomes user 1000 and tries the rest. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/bpf.h>
#include <linux/perf_event.h>
#include <linux/vm_sockets.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/io.h>
#include <sys/klog.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define USER 1000
#define AGENT_PORT 1024

static void
tell(const char *name, long result)
{
    printf("%s %s\n", name, result < 0 ? strerrorname_np(errno) : "0");
    fflush(stdout);
}

static void
as_root(void)
{
    tell("root:kexec_load", syscall(SYS_kexec_load, 0, 0, 0, 0));
    tell("root:init_module", syscall(SYS_init_module, "", 0L, ""));
    tell("root:open:/dev/mem", open("/dev/mem", O_RDWR));
    tell("root:iopl", iopl(3));
    tell("root:open:/proc/sysrq-trigger", open("/proc/sysrq-trigger", O_WRONLY));
    tell("root:open:/proc/kcore", open("/proc/kcore", O_RDONLY));
    tell("root:open:/proc/sys/kernel/hostname", open("/proc/sys/kernel/hostname", O_WRONLY));
    tell("root:open:/sys/kernel/mm/transparent_hugepage/enabled",
         open("/sys/kernel/mm/transparent_hugepage/enabled", O_WRONLY));
}

/* The agent of this very machine, by way of the kernel's loopback: "0" is a closed connection. */
static void
dial_agent(void)
{
    static const char preface[] = "\x89mgst\n\0\1";
    struct sockaddr_vm agent = {.svm_family = AF_VSOCK, .svm_port = AGENT_PORT,
                                .svm_cid = VMADDR_CID_LOCAL};
    char answer;
    int dialled = socket(AF_VSOCK, SOCK_STREAM, 0);
    long result = connect(dialled, (struct sockaddr *)&agent, sizeof agent);
    if (result == 0)
        result = send(dialled, preface, sizeof preface - 1, MSG_NOSIGNAL) < 0
                     ? -1 : read(dialled, &answer, 1);
    if (result > 0)
        printf("user:dial answered\n");
    else
        tell("user:dial", result);
}

/* Another process of the same user, which is neither above nor below. */
static void
trace_sibling(void)
{
    pid_t victim = fork();
    if (victim == 0) {
        pause();
        _exit(0);
    }
    pid_t attacker = fork();
    if (attacker == 0) {
        tell("user:ptrace", ptrace(PTRACE_ATTACH, victim, 0, 0));
        _exit(0);
    }
    waitpid(attacker, NULL, 0);
    kill(victim, SIGKILL);
    waitpid(victim, NULL, 0);
}

static void
as_user(void)
{
    char buffer[64];
    union bpf_attr map = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4,
                          .max_entries = 1};
    struct perf_event_attr event = {.type = PERF_TYPE_SOFTWARE, .size = sizeof event,
                                    .config = PERF_COUNT_SW_CPU_CLOCK};
    tell("user:syslog", klogctl(3, buffer, sizeof buffer));
    tell("user:open:/dev/kmsg", open("/dev/kmsg", O_RDONLY | O_NONBLOCK));
    tell("user:bpf", syscall(SYS_bpf, BPF_MAP_CREATE, &map, sizeof map));
    tell("user:perf_event_open", syscall(SYS_perf_event_open, &event, 0, -1, -1, 0L));
    tell("user:userfaultfd", syscall(SYS_userfaultfd, 0));
    tell("user:open:/proc/1/cmdline", open("/proc/1/cmdline", O_RDONLY));
    tell("user:link", link("/bin/busybox", "/tmp/user/busybox"));
    trace_sibling();
    dial_agent();
    tell("user:unshare", unshare(CLONE_NEWUSER));
}

/* What a user has put into /tmp for root to fall over. */
static void
in_tmp(void)
{
    tell("tmp:symlink", open("/tmp/link", O_RDONLY));
    tell("tmp:fifo", open("/tmp/fifo", O_RDWR | O_CREAT | O_NONBLOCK, 0600));
    tell("tmp:regular", open("/tmp/file", O_RDWR | O_CREAT, 0600));
}

static void
prepare_tmp(void)
{
    umask(0);
    mkdir("/tmp/user", 0777);
    int file = open("/tmp/file", O_RDWR | O_CREAT | O_EXCL, 0666);
    if (symlink("/etc/passwd", "/tmp/link") || mkfifo("/tmp/fifo", 0666) || file < 0)
        perror("/tmp");
}

int
main(void)
{
    pid_t user = fork();
    if (user == 0) {
        if (setgroups(0, NULL) || setgid(USER) || setuid(USER))
            return 1;
        prctl(PR_SET_DUMPABLE, 1); /* as after an exec */
        prepare_tmp();
        as_user();
        return 0;
    }
    waitpid(user, NULL, 0);
    in_tmp();
    as_root();
    return 0;
}
