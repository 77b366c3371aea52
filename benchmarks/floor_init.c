/* The floor of a boot: the mounts of init_shim in C, and nothing else of what it does.
 *
 *   As PID 1 of a virtual machine: API file systems, the bundle's modules, the erofs on the disk
 *   `root` under a tmpfs, switch root, loopback, the program, power off.
 *   floor_init RUN ROOT PROGRAM…: the same without disk and modules, in namespaces like the
 *   launcher's; RUN is an empty folder.
 *
 * Errors end it with a line; it is a measuring stick, not an init. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define API (MS_NOSUID | MS_NODEV | MS_NOEXEC)

static void fail(const char *what, const char *where)
{
    fprintf(stderr, "floor_init: %s %s: %s\n", what, where, strerror(errno));
    _exit(125);
}

static void mounted(const char *from, const char *at, const char *type, unsigned long flags,
                    const char *options)
{
    mkdir(at, 0755);
    if (mount(from, at, type, flags, options) && errno != EBUSY)
        fail("mount", at);
}

static void make_file(const char *path)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0)
        fail("open", path);
    close(fd);
}

static void mount_inside_dev(void)
{
    mounted("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=0620,ptmxmode=0666");
    mounted("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
    mounted("mqueue", "/dev/mqueue", "mqueue", API, NULL);
    mounted("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755");
}

static void mount_root(void)
{
    struct stat top;
    mounted("tmpfs", "/upper", "tmpfs", MS_NODEV, "mode=0755,size=50%");
    mkdir("/upper/upper", 0755);
    mkdir("/upper/work", 0755);
    if (stat("/layer", &top) || chown("/upper/upper", top.st_uid, top.st_gid) ||
        chmod("/upper/upper", top.st_mode & 07777))
        fail("stat", "/layer");
    mounted("overlay", "/newroot", "overlay", 0,
            "lowerdir=/layer,upperdir=/upper/upper,workdir=/upper/work");
    static const char *const moved[] = {"/proc", "/sys", "/dev", "/run"};
    for (int i = 0; i < 4; i++) {
        char target[64];
        snprintf(target, sizeof target, "/newroot%s", moved[i]);
        mounted(moved[i], target, NULL, MS_MOVE, NULL);
    }
    if (chdir("/newroot"))
        fail("chdir", "/newroot");
}

static void loopback_up(void)
{
    struct ifreq request = {.ifr_name = "lo"};
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (control < 0 || ioctl(control, SIOCGIFFLAGS, &request))
        fail("ioctl", "lo");
    request.ifr_flags |= IFF_UP;
    if (ioctl(control, SIOCSIFFLAGS, &request))
        fail("ioctl", "lo");
    close(control);
    sethostname("floor", 5);
}

static int run_program(char *const argv[])
{
    int status = 0;
    pid_t pid = vfork();
    if (pid == 0) {
        execv(argv[0], argv);
        _exit(127);
    }
    while (waitpid(-1, &status, 0) != pid)
        ;
    return WEXITSTATUS(status);
}

/* ── in a virtual machine ───────────────────────────────────────────────────────────────────── */

static void load_modules(void)
{
    char name[256], path[300];
    FILE *order = fopen("/microguest/modules/order", "r");
    if (!order)
        return;
    while (fscanf(order, "%255s", name) == 1) {
        snprintf(path, sizeof path, "/microguest/modules/%s", name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST))
            fail("finit_module", path);
        close(fd);
    }
    fclose(order);
}

static void mount_disk(void)
{
    for (int tries = 0; tries < 600; tries++) {
        DIR *folder = opendir("/sys/block");
        struct dirent *entry;
        while (folder && (entry = readdir(folder))) {
            char path[300], serial[32] = "";
            snprintf(path, sizeof path, "/sys/block/%s/serial", entry->d_name);
            int fd = open(path, O_RDONLY | O_CLOEXEC);
            if (fd >= 0) {
                if (read(fd, serial, sizeof serial - 1) < 0)
                    serial[0] = 0;
                close(fd);
            }
            if (strncmp(serial, "root", 4) == 0) {
                snprintf(path, sizeof path, "/dev/%s", entry->d_name);
                mounted(path, "/layer", "erofs", MS_RDONLY | MS_NODEV, NULL);
                closedir(folder);
                return;
            }
        }
        if (folder)
            closedir(folder);
        usleep(5000);
    }
    fail("find", "the disk root");
}

static void boot_machine(char *const argv[])
{
    mounted("proc", "/proc", "proc", API, NULL);
    mounted("sysfs", "/sys", "sysfs", API, NULL);
    mounted("devtmpfs", "/dev", "devtmpfs", MS_NOSUID | MS_NOEXEC, "mode=0755");
    int console = open("/dev/console", O_RDWR);
    for (int fd = 0; fd < 3; fd++)
        dup2(console, fd);
    mount_inside_dev();
    mounted("cgroup2", "/sys/fs/cgroup", "cgroup2", API, "nsdelegate");
    load_modules();
    mount_disk();
    mount_root();
    if (mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
        fail("chroot", "/newroot");
    loopback_up();
    run_program(argv);
    sync();
    reboot(RB_POWER_OFF);
}

/* ── in namespaces ──────────────────────────────────────────────────────────────────────────── */

static void boot_namespaces(const char *run, const char *root, char *const argv[])
{
    char path[512];
    static const char *const devices[] = {"full", "null", "random", "tty", "urandom", "zero"};
    if (unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWCGROUP))
        fail("unshare", "namespaces");
    mount(NULL, "/", NULL, MS_PRIVATE | MS_REC, NULL);
    int layer = open(root, O_PATH | O_CLOEXEC);
    if (layer < 0)
        fail("open", root);
    mounted("tmpfs", run, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=16m");
    char *const made[] = {"layer", "dev", "proc", "sys", "run", "newroot", "old"};
    for (int i = 0; i < 7; i++) {
        snprintf(path, sizeof path, "%s/%s", run, made[i]);
        mkdir(path, 0755);
    }
    char from[64];
    snprintf(from, sizeof from, "/proc/self/fd/%d", layer);
    snprintf(path, sizeof path, "%s/layer", run);
    mounted(from, path, NULL, MS_BIND | MS_REC, NULL);
    mounted(NULL, path, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL);
    snprintf(path, sizeof path, "%s/dev", run);
    mounted("tmpfs", path, "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=0755,size=64k");
    for (int i = 0; i < 6; i++) {
        snprintf(from, sizeof from, "/dev/%s", devices[i]);
        snprintf(path, sizeof path, "%s/dev/%s", run, devices[i]);
        make_file(path);
        mounted(from, path, NULL, MS_BIND, NULL);
    }
    snprintf(path, sizeof path, "%s/proc", run);
    mounted("proc", path, "proc", API, NULL);
    snprintf(path, sizeof path, "%s/sys", run);
    mounted("sysfs", path, "sysfs", API | MS_RDONLY, NULL);
    snprintf(path, sizeof path, "%s/sys/fs/cgroup", run);
    mount("cgroup2", path, "cgroup2", API | MS_RDONLY, NULL);
    if (chdir(run) || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/"))
        fail("pivot_root", run);
    mount_inside_dev();
    mount_root();
    if (syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/"))
        fail("pivot_root", "/newroot");
    loopback_up();
    run_program(argv);
    reboot(RB_POWER_OFF);
}

int main(int argc, char **argv)
{
    if (getpid() == 1) {
        char *const program[] = {"/bin/busybox", "echo", "workload-runs", NULL};
        boot_machine(program);
        return 125;
    }
    if (argc < 4) {
        fprintf(stderr, "usage: floor_init RUN ROOT PROGRAM [ARGUMENT…]\n");
        return 2;
    }
    if (unshare(CLONE_NEWPID))
        fail("unshare", "PID namespace");
    pid_t pid = fork();
    if (pid == 0) {
        boot_namespaces(argv[1], argv[2], argv + 3);
        _exit(125);
    }
    int status;
    waitpid(pid, &status, 0);
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGINT ? 0 : 1;
}
