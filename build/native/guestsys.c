/*
 * The guest's C: the program's entry point and the module _guestsys.
 *
 * main() starts the interpreter with nothing from outside: no environment, no search path, no site,
 * every module from the frozen table that the build generates. It must work as PID 1 before anything
 * is mounted, and in a root that is empty.
 *
 * _guestsys has the system calls that PID 1 and the agent need and CPython does not offer. Each
 * function is one call, and spawn() is the one that could not be: what happens between clone and
 * exec. Policy is in Python. Errors are OSError with errno.
 *
 * With GUESTSYS_ALONE only the module is compiled, for a plain Python of 3.11 or later to import: see
 * build/host_module.py.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN /* for sizes in arguments, before Python 3.13 */
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <linux/capability.h> /* the structures of capset(2) */
#include <linux/filter.h> /* struct sock_filter, struct sock_fprog */
#include <linux/sched.h> /* CLONE_PIDFD, CLONE_INTO_CGROUP */
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- _guestsys ---------------------------------------------------------------------------- */

static PyObject *
os_error(void)
{
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* mount(source, target, fstype, flags=0, data=None): mount(2); source and fstype may be None */
static PyObject *
sys_mount(PyObject *module, PyObject *args)
{
    const char *source, *target, *fstype, *data = NULL;
    unsigned long flags = 0;
    int failed;
    if (!PyArg_ParseTuple(args, "zsz|kz:mount", &source, &target, &fstype, &flags, &data))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = mount(source, target, fstype, flags, data);
    Py_END_ALLOW_THREADS
    if (failed)
        return os_error();
    Py_RETURN_NONE;
}

/* mount_setattr(fd, attr_set): mount_setattr(2) for the mount at a descriptor and all below it */
static PyObject *
sys_mount_setattr(PyObject *module, PyObject *args)
{
    struct {
        uint64_t attr_set, attr_clr, propagation, userns_fd;
    } attributes = {0};
    unsigned long long set;
    int fd;
    long failed;
    if (!PyArg_ParseTuple(args, "iK:mount_setattr", &fd, &set))
        return NULL;
    attributes.attr_set = set;
    Py_BEGIN_ALLOW_THREADS
    failed = syscall(SYS_mount_setattr, fd, "", AT_EMPTY_PATH | AT_RECURSIVE, &attributes,
                     sizeof attributes);
    Py_END_ALLOW_THREADS
    if (failed)
        return os_error();
    Py_RETURN_NONE;
}

/* umount2(target, flags=0): umount2(2) */
static PyObject *
sys_umount2(PyObject *module, PyObject *args)
{
    const char *target;
    int flags = 0, failed;
    if (!PyArg_ParseTuple(args, "s|i:umount2", &target, &flags))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = umount2(target, flags);
    Py_END_ALLOW_THREADS
    if (failed)
        return os_error();
    Py_RETURN_NONE;
}

/* pivot_root(new_root, put_old): pivot_root(2) */
static PyObject *
sys_pivot_root(PyObject *module, PyObject *args)
{
    const char *new_root, *put_old;
    if (!PyArg_ParseTuple(args, "ss:pivot_root", &new_root, &put_old))
        return NULL;
    if (syscall(SYS_pivot_root, new_root, put_old))
        return os_error();
    Py_RETURN_NONE;
}

/* reboot(command): reboot(2) with one of the LINUX_REBOOT_CMD_ numbers; does not sync */
static PyObject *
sys_reboot(PyObject *module, PyObject *args)
{
    unsigned int command;
    int failed;
    if (!PyArg_ParseTuple(args, "I:reboot", &command))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = reboot((int)command);
    Py_END_ALLOW_THREADS
    if (failed)
        return os_error();
    Py_RETURN_NONE;
}

/* let_go(pid, signal): PTRACE_DETACH of what this thread traces and was told the stop of; see the stub */
static PyObject *
sys_let_go(PyObject *module, PyObject *args)
{
    int pid, signal;
    if (!PyArg_ParseTuple(args, "ii:let_go", &pid, &signal))
        return NULL;
    if (signal == SIGTRAP)
        signal = 0;
    if (ptrace(PTRACE_DETACH, pid, NULL, (void *)(intptr_t)signal) && errno != ESRCH)
        return os_error();
    Py_RETURN_NONE;
}

/* finit_module(fd, parameters="", flags=0): finit_module(2) */
static PyObject *
sys_finit_module(PyObject *module, PyObject *args)
{
    const char *parameters = "";
    int fd, flags = 0;
    long failed;
    if (!PyArg_ParseTuple(args, "i|si:finit_module", &fd, &parameters, &flags))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = syscall(SYS_finit_module, fd, parameters, flags);
    Py_END_ALLOW_THREADS
    if (failed)
        return os_error();
    Py_RETURN_NONE;
}

/* Of System V, in the order of the numbers that ipc_objects and ipc_remove take. */
enum ipc_kind { IPC_SHM, IPC_MSG, IPC_SEM };

union semun { /* semctl(2): programs define it themselves */
    int val;
    struct semid_ds *buf;
    struct seminfo *info;
};

/* The highest index in the kernel's table of a kind; negative with errno. */
static int
ipc_last(int kind)
{
    struct shm_info shm;
    struct msginfo msg;
    struct seminfo sem;
    switch (kind) {
    case IPC_SHM:
        return shmctl(0, SHM_INFO, (struct shmid_ds *)&shm);
    case IPC_MSG:
        return msgctl(0, MSG_INFO, (struct msqid_ds *)&msg);
    case IPC_SEM:
        return semctl(0, 0, SEM_INFO, (union semun){.info = &sem});
    default:
        errno = EINVAL;
        return -1;
    }
}

/* What is at an index: its id and what .pyi says of it; -1 where there is nothing. */
static int
ipc_at(int kind, int index, unsigned long *attached, int pids[2])
{
    struct shmid_ds shm;
    struct msqid_ds msg;
    struct semid_ds sem;
    int id;
    *attached = 0;
    pids[0] = pids[1] = 0;
    switch (kind) {
    case IPC_SHM:
        id = shmctl(index, SHM_STAT, &shm);
        if (id >= 0) {
            *attached = shm.shm_nattch;
            pids[0] = shm.shm_cpid;
            pids[1] = shm.shm_lpid;
        }
        return id;
    case IPC_MSG:
        id = msgctl(index, MSG_STAT, &msg);
        if (id >= 0) {
            pids[0] = msg.msg_lspid;
            pids[1] = msg.msg_lrpid;
        }
        return id;
    default:
        return semctl(index, 0, SEM_STAT, (union semun){.buf = &sem});
    }
}

/* ipc_objects(kind): see .pyi */
static PyObject *
sys_ipc_objects(PyObject *module, PyObject *args)
{
    int kind;
    if (!PyArg_ParseTuple(args, "i:ipc_objects", &kind))
        return NULL;
    int last = ipc_last(kind);
    if (last < 0)
        return os_error();
    PyObject *found = PyList_New(0);
    for (int index = 0; found && index <= last; index++) {
        unsigned long attached;
        int pids[2];
        int id = ipc_at(kind, index, &attached, pids);
        if (id < 0)
            continue;
        PyObject *one = Py_BuildValue("(ik(ii))", id, attached, pids[0], pids[1]);
        if (!one || PyList_Append(found, one))
            Py_CLEAR(found);
        Py_XDECREF(one);
    }
    return found;
}

/* ipc_remove(kind, id): IPC_RMID of shmctl(2), msgctl(2) or semctl(2) */
static PyObject *
sys_ipc_remove(PyObject *module, PyObject *args)
{
    int kind, id, failed;
    if (!PyArg_ParseTuple(args, "ii:ipc_remove", &kind, &id))
        return NULL;
    if (kind == IPC_SHM)
        failed = shmctl(id, IPC_RMID, NULL);
    else if (kind == IPC_MSG)
        failed = msgctl(id, IPC_RMID, NULL);
    else
        failed = semctl(id, 0, IPC_RMID);
    if (failed)
        return os_error();
    Py_RETURN_NONE;
}

/* unshare(flags): unshare(2) */
static PyObject *
sys_unshare(PyObject *module, PyObject *args)
{
    int flags;
    if (!PyArg_ParseTuple(args, "i:unshare", &flags))
        return NULL;
    if (unshare(flags))
        return os_error();
    Py_RETURN_NONE;
}

/* setns(fd, nstype=0): setns(2) */
static PyObject *
sys_setns(PyObject *module, PyObject *args)
{
    int fd, nstype = 0;
    if (!PyArg_ParseTuple(args, "i|i:setns", &fd, &nstype))
        return NULL;
    if (setns(fd, nstype))
        return os_error();
    Py_RETURN_NONE;
}

/* prctl(option, arg2=0, arg3=0, arg4=0, arg5=0): prctl(2), for options whose arguments are numbers */
static PyObject *
sys_prctl(PyObject *module, PyObject *args)
{
    int option;
    unsigned long values[4] = {0};
    if (!PyArg_ParseTuple(args, "i|kkkk:prctl", &option, &values[0], &values[1], &values[2],
                          &values[3]))
        return NULL;
    int result = prctl(option, values[0], values[1], values[2], values[3]);
    if (result < 0)
        return os_error();
    return PyLong_FromLong(result);
}

/* openat2(dir_fd, path, flags, mode=0, resolve=0): openat2(2); the descriptor is close-on-exec */
static PyObject *
sys_openat2(PyObject *module, PyObject *args)
{
    struct {
        uint64_t flags, mode, resolve;
    } how = {0};
    unsigned long long flags, mode = 0, resolve = 0;
    PyObject *path;
    int dir_fd;
    long fd;
    if (!PyArg_ParseTuple(args, "iO&K|KK:openat2", &dir_fd, PyUnicode_FSConverter, &path, &flags,
                          &mode, &resolve))
        return NULL;
    how.flags = flags | O_CLOEXEC;
    how.mode = mode;
    how.resolve = resolve;
    Py_BEGIN_ALLOW_THREADS
    fd = syscall(SYS_openat2, dir_fd, PyBytes_AS_STRING(path), &how, sizeof how);
    Py_END_ALLOW_THREADS
    Py_DECREF(path);
    if (fd < 0)
        return os_error();
    return PyLong_FromLong(fd);
}

/* ---- spawn ---------------------------------------------------------------------------------
 *
 * The child is made with CLONE_VM | CLONE_VFORK: it runs on a stack of its own in the parent's memory
 * while the parent stands still, so there is no page table to copy and no pipe to report errors over.
 * Because memory is shared, the child makes system calls and nothing else; libc's setuid() and its
 * like would try to reach the parent's threads. All signals are blocked until the child has reset
 * every handler, otherwise a handler of the parent could run in the child.
 *
 * A child that gets a seccomp filter has a copy of the memory instead. The filter is in force before
 * exec: it may kill the child there, and before Linux 5.16 a death that dumps core takes everybody
 * with it who has the same memory; or it may refuse exit_group(2), and the child would run on. Only
 * the plan is shared then.
 *
 * The GIL is held from clone to exec: the calling thread is stopped by the kernel for that time
 * anyway, and it makes the one static stack safe.
 */

enum { STACK_SIZE = 32 * 1024, SIGNAL_SET_SIZE = 8, LAST_SIGNAL = 64, FIRST_OWN_FD = 3 };
enum { START_SECONDS = 5 }; /* from clone to exec */
enum { END_MILLISECONDS = 100 }; /* from a failed start to the end of its child */

struct limit {
    int resource;
    uint64_t values[2]; /* soft, hard: struct rlimit64 */
};

/* The five sets of capabilities(7), a bit for each capability. */
struct capability_sets {
    unsigned long long bounding, permitted, effective, inheritable, ambient;
};

/* What the child has to do, and what became of it; it lives in the parent, both see it. */
struct plan {
    char **argv, **env, **candidates;
    const char *cwd, *oom_score_adj;
    const gid_t *groups;
    const struct limit *limits;
    size_t group_count, limit_count;
    uid_t uid;
    gid_t gid;
    mode_t umask;
    int fds[FIRST_OWN_FD];
    int session, tty, cgroup_fd, no_new_privs, enter_first, filter_first;
    int64_t capabilities; /* a bit for each that it may have; -1: all that there are */
    const struct capability_sets *sets; /* instead of `capabilities`, or NULL */
    struct sock_fprog filter; /* seccomp(2)'s program; len 0: none */

    const char *step; /* the step that the child is at */
    const char *path; /* of the program, where exec failed */
    int error;        /* errno of that step; 0: the child is running the program */
};

/* Write a short text to a file in /proc or a cgroup. Returns -1 with errno. */
static long
write_file(int directory, const char *name, const char *text)
{
    long fd = syscall(SYS_openat, directory, name, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    long written = syscall(SYS_write, fd, text, strlen(text));
    int error = errno;
    syscall(SYS_close, fd);
    errno = error;
    return written;
}

/* Lowering is for the privileged, and a root without /proc has nothing to write to: both are no
 * reason not to start. */
static long
set_oom_score_adj(const char *value)
{
    if (write_file(AT_FDCWD, "/proc/self/oom_score_adj", value) >= 0)
        return 0;
    return errno == EACCES || errno == EPERM || errno == ENOENT || errno == EROFS ? 0 : -1;
}

/* setgroups(2) is closed for good in a user namespace that an ordinary user made (user_namespaces(7));
 * a process that needs no group beside its own can run there all the same, with those that it has. */
static long
set_groups(size_t count, const gid_t *groups, gid_t own)
{
    char policy[4];
    if (syscall(SYS_setgroups, count, groups) == 0)
        return 0;
    for (size_t i = 0; i < count; i++)
        if (groups[i] != own)
            return -1;
    if (errno != EPERM)
        return -1;
    long fd = syscall(SYS_openat, AT_FDCWD, "/proc/self/setgroups", O_RDONLY | O_CLOEXEC);
    long got = fd < 0 ? -1 : syscall(SYS_read, fd, policy, sizeof policy);
    if (fd >= 0)
        syscall(SYS_close, fd);
    if (got == sizeof policy && memcmp(policy, "deny", sizeof policy) == 0)
        return 0;
    errno = EPERM;
    return -1;
}

/* Take capabilities out of the bounding set, from which no exec can bring them back. */
static long
drop_bounding_set(uint64_t kept)
{
    for (int capability = 0; capability < 64; capability++) {
        if (kept >> capability & 1)
            continue;
        if (syscall(SYS_prctl, PR_CAPBSET_DROP, capability, 0, 0, 0) < 0)
            return errno == EINVAL ? 0 : -1; /* beyond the last one that this kernel has */
    }
    return 0;
}

/* Of the sets that setresuid(2) has left, only what is kept; nothing inherited. Exec then gives root
 * the bounding set and everybody else what the file has, as in a container. */
static long
keep_capabilities(uint64_t kept)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct sets[2];
    if (syscall(SYS_capget, &header, sets) < 0)
        return -1;
    for (int half = 0; half < 2; half++) {
        uint32_t mask = (uint32_t)(kept >> 32 * half);
        sets[half].effective &= mask;
        sets[half].permitted &= mask;
        sets[half].inheritable = 0; /* the ambient set follows */
    }
    return syscall(SYS_capset, &header, sets);
}

/* The ambient set: an exec by who is not root starts with it. What this kernel does not know is left
 * out, as capset(2) leaves it out. */
static long
raise_ambient(uint64_t wanted)
{
    if (syscall(SYS_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
        return -1;
    for (int capability = 0; capability < 64; capability++) {
        if (!(wanted >> capability & 1))
            continue;
        if (syscall(SYS_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0) < 0 &&
            errno != EINVAL)
            return -1;
    }
    return 0;
}

/* Exactly these sets; the bounding one was made before, while that was allowed. */
static long
set_capabilities(const struct capability_sets *sets)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct halves[2];
    for (int half = 0; half < 2; half++) {
        halves[half].effective = (uint32_t)(sets->effective >> 32 * half);
        halves[half].permitted = (uint32_t)(sets->permitted >> 32 * half);
        halves[half].inheritable = (uint32_t)(sets->inheritable >> 32 * half);
    }
    if (syscall(SYS_capset, &header, halves) < 0)
        return -1;
    return raise_ambient(sets->ambient);
}

/* Make fds[i] be descriptor i. The sources may be any numbers, also each other's targets, so those
 * that a target would overwrite are moved out of the way first. */
static long
place_standard_fds(int *fds)
{
    for (int i = 0; i < FIRST_OWN_FD; i++) {
        if (fds[i] == i || fds[i] >= FIRST_OWN_FD)
            continue;
        fds[i] = (int)syscall(SYS_fcntl, fds[i], F_DUPFD_CLOEXEC, FIRST_OWN_FD);
        if (fds[i] < 0)
            return -1;
    }
    for (int i = 0; i < FIRST_OWN_FD; i++) {
        long done = fds[i] == i ? syscall(SYS_fcntl, i, F_SETFD, 0) : syscall(SYS_dup3, fds[i], i, 0);
        if (done < 0)
            return -1;
    }
    return 0;
}

/* From here on /proc/PID/mem and its like are for CAP_SYS_PTRACE alone, until an exec. Without it,
 * whoever has this process's user and its capabilities could read and write the memory: the agent's.
 * A change of the user or group sets what /proc/sys/fs/suid_dumpable says, which may be 1. */
static long
close_memory(void)
{
    return syscall(SYS_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0);
}

/* Every descriptor of the agent is close-on-exec already; this holds whatever a library opened. */
static long
close_other_fds(void)
{
    uint64_t limit[2];
    if (syscall(SYS_close_range, FIRST_OWN_FD, ~0U, 0) == 0)
        return 0;
    if (errno != ENOSYS || syscall(SYS_prlimit64, 0, RLIMIT_NOFILE, NULL, limit))
        return -1;
    for (uint64_t fd = FIRST_OWN_FD; fd < limit[0]; fd++) /* before Linux 5.9 */
        syscall(SYS_close, (int)fd);
    return 0;
}

/* Back to what a program expects: default dispositions (an ignored signal would stay ignored over
 * exec, and Python ignores SIGPIPE) and nothing blocked. */
static long
default_signals(void)
{
    static const uint64_t default_action[4]; /* the kernel's struct sigaction; 0 is SIG_DFL */
    static const uint64_t nothing;
    for (int number = 1; number <= LAST_SIGNAL; number++)
        if (number != SIGKILL && number != SIGSTOP)
            syscall(SYS_rt_sigaction, number, default_action, NULL, SIGNAL_SET_SIZE);
    return syscall(SYS_rt_sigprocmask, SIG_SETMASK, &nothing, NULL, SIGNAL_SET_SIZE);
}

/* reset_signals(): rt_sigaction(2) of every signal, those included that the C library keeps for
 * itself and that whoever started us may have ignored */
static PyObject *
sys_reset_signals(PyObject *module, PyObject *args)
{
    if (default_signals())
        return os_error();
    Py_RETURN_NONE;
}

static long
set_filter(const struct sock_fprog *filter)
{
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, filter);
}

/* As execvp(3): go on to the next candidate where this one is not there, remember that one was not
 * allowed. Returns only with the errno to report; `path` says of which candidate. */
static int
execute(struct plan *plan)
{
    int error = ENOENT;
    plan->path = plan->candidates[0];
    for (char **candidate = plan->candidates; *candidate; candidate++) {
        syscall(SYS_execve, *candidate, plan->argv, plan->env);
        if (errno == EACCES && error != EACCES) {
            error = EACCES;
            plan->path = *candidate;
        }
        if (errno != ENOENT && errno != ENOTDIR && errno != EACCES) {
            plan->path = *candidate;
            return errno;
        }
    }
    return error;
}

/* clang-format off */
#define STEP(name, call) do { plan->step = (name); if ((call) < 0) return errno; } while (0)
/* clang-format on */

/* The child's way to exec, in order. Returns the errno of the step that failed.
 *
 * It has the parent's memory, or a copy, and everybody else may stop it at each step as soon as it is
 * theirs. So all that it began with is permitted to it, whoever it is, until its memory is closed:
 * PR_SET_KEEPCAPS. Exec takes that away, and gives what it would have given. */
static int
prepare_and_execute(struct plan *plan)
{
    if (plan->cgroup_fd >= 0)
        STEP("cgroup", write_file(plan->cgroup_fd, "cgroup.procs", "0"));
    if (plan->session)
        STEP("setsid", syscall(SYS_setsid));
    else
        STEP("setpgid", syscall(SYS_setpgid, 0, 0));
    if (plan->tty >= 0)
        STEP("tty", syscall(SYS_ioctl, plan->tty, TIOCSCTTY, 0));
    STEP("fds", place_standard_fds(plan->fds));
    STEP("close_range", close_other_fds()); /* nobody can open them again in /proc/PID/fd */
    STEP("oom_score_adj", set_oom_score_adj(plan->oom_score_adj));
    for (size_t i = 0; i < plan->limit_count; i++)
        STEP("rlimit", syscall(SYS_prlimit64, 0, plan->limits[i].resource, plan->limits[i].values, NULL));
    if (plan->filter_first && plan->filter.len) /* while that is allowed without no_new_privs */
        STEP("seccomp", set_filter(&plan->filter));
    STEP("setgroups", set_groups(plan->group_count, plan->groups, plan->gid));
    if (plan->capabilities >= 0)
        STEP("capabilities", drop_bounding_set((uint64_t)plan->capabilities));
    if (plan->sets)
        STEP("capabilities", drop_bounding_set(plan->sets->bounding));
    if (plan->sets)
        STEP("capabilities", syscall(SYS_prctl, PR_SET_KEEPCAPS, 1, 0, 0, 0)); /* over setresuid */
    else if (plan->uid)
        syscall(SYS_prctl, PR_SET_KEEPCAPS, 1, 0, 0, 0); /* may be locked: PR_SET_SECUREBITS */
    /* As runc: a working directory that only root may enter is no obstacle. */
    int inside = plan->enter_first && syscall(SYS_chdir, plan->cwd) == 0;
    STEP("setgid", syscall(SYS_setresgid, plan->gid, plan->gid, plan->gid));
    STEP("setuid", syscall(SYS_setresuid, plan->uid, plan->uid, plan->uid));
    STEP("dumpable", close_memory());
    if (plan->capabilities >= 0)
        STEP("capabilities", keep_capabilities((uint64_t)plan->capabilities));
    if (plan->sets)
        STEP("capabilities", set_capabilities(plan->sets));
    syscall(SYS_umask, plan->umask);
    if (!inside)
        STEP("chdir", syscall(SYS_chdir, plan->cwd));
    const int filter_last = plan->filter.len && !plan->filter_first;
    if (plan->no_new_privs || filter_last) /* without it a filter is for the privileged */
        STEP("no_new_privs", syscall(SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    STEP("signals", default_signals());
    if (filter_last) /* so that it has to allow no other call than execve */
        STEP("seccomp", set_filter(&plan->filter));
    plan->step = "exec";
    return execute(plan);
}

/* The parent stands still until the child has exec'ed or ended. A user may stop the child as soon as
 * it is the user's, or make exec wait, as a lease on the program does (fcntl(2)): so a timer ends the
 * child. It is the kernel that kills, and exec takes the timer away. */
static void
limit_time(void)
{
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGKILL};
    const struct itimerspec time = {.it_value = {.tv_sec = START_SECONDS}};
    int timer;
    if (syscall(SYS_timer_create, CLOCK_MONOTONIC, &event, &timer) == 0)
        syscall(SYS_timer_settime, timer, 0, &time, NULL);
}

static int
child_main(void *argument)
{
    struct plan *plan = argument;
    limit_time();
    plan->error = prepare_and_execute(plan);
    syscall(SYS_exit_group, 127);
    __builtin_trap(); /* the filter refused it; this needs no system call */
}

/* struct clone_args of clone3(2), up to the field that Linux 5.7 added */
struct clone_arguments {
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls;
    uint64_t set_tid, set_tid_size, cgroup;
};

/* clone3(2); the child, on its new stack, goes to child_main. Returns the pid or -errno. No libc has
 * a wrapper, and a plain syscall() would return in the child to a stack that is not there. */
static long
clone3_child(struct clone_arguments *arguments, struct plan *plan)
{
#if defined(__x86_64__)
    long result = SYS_clone3;
    register int (*entry)(void *) __asm__("r8") = child_main;
    register struct plan *argument __asm__("r9") = plan;
    __asm__ volatile("syscall\n\t"
                     "test %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "xor %%ebp, %%ebp\n\t"
                     "mov %%r9, %%rdi\n\t"
                     "call *%%r8\n"
                     "1:"
                     : "+a"(result)
                     : "D"(arguments), "S"(sizeof *arguments), "r"(entry), "r"(argument)
                     : "rcx", "r11", "memory");
    return result;
#elif defined(__aarch64__)
    register long number __asm__("x8") = SYS_clone3;
    register long result __asm__("x0") = (long)arguments;
    register long size __asm__("x1") = sizeof *arguments;
    register int (*entry)(void *) __asm__("x2") = child_main;
    register struct plan *argument __asm__("x3") = plan;
    __asm__ volatile("svc 0\n\t"
                     "cbnz x0, 1f\n\t"
                     "mov x29, xzr\n\t"
                     "mov x0, x3\n\t"
                     "blr x2\n"
                     "1:"
                     : "+r"(result)
                     : "r"(number), "r"(size), "r"(entry), "r"(argument)
                     : "memory", "x30");
    return result;
#else
    return -ENOSYS;
#endif
}

/* Make the child and wait until it has exec'ed or ended. Returns its pid, or -errno of the clone. */
static long
start_child(struct plan *plan, int *pidfd)
{
    static char stack[STACK_SIZE] __attribute__((aligned(16)));
    static const uint64_t everything = ~UINT64_C(0);
    const uint64_t memory = plan->filter.len ? 0 : CLONE_VM;
    const uint64_t flags = memory | CLONE_VFORK | CLONE_PIDFD;
    struct clone_arguments arguments = {
        .flags = flags,
        .pidfd = (uintptr_t)pidfd,
        .exit_signal = SIGCHLD,
        .stack = (uintptr_t)stack,
        .stack_size = sizeof stack,
    };
    const int cgroup_fd = plan->cgroup_fd;
    uint64_t mask;
    if (cgroup_fd >= 0) {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = (uint64_t)cgroup_fd;
        plan->cgroup_fd = -1;
    }
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &everything, &mask, SIGNAL_SET_SIZE);
    long pid = clone3_child(&arguments, plan);
    if (pid == -ENOSYS) { /* before Linux 5.3, or a seccomp filter that cannot look into its arguments */
        plan->cgroup_fd = cgroup_fd; /* then the child moves itself */
        pid = clone(child_main, stack + sizeof stack, (int)flags | SIGCHLD, plan, pidfd);
        if (pid < 0)
            pid = -errno;
    }
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &mask, NULL, SIGNAL_SET_SIZE);
    return pid;
}

static PyObject *spawn_error; /* _guestsys.SpawnError */

/* Raise SpawnError(errno, strerror, path) with its step, and the child that is not reaped, or 0. */
static PyObject *
raise_spawn_error(const char *step, int error, const char *path, long left)
{
    /* A caller's bytes, which need not be UTF-8: "z" would refuse them. */
    PyObject *where = path ? PyUnicode_DecodeFSDefault(path) : Py_NewRef(Py_None);
    PyObject *exception =
        where ? PyObject_CallFunction(spawn_error, "isO", error, strerror(error), where) : NULL;
    PyObject *name = PyUnicode_FromString(step);
    PyObject *pid = PyLong_FromLong(left);
    if (exception && name && pid && !PyObject_SetAttrString(exception, "step", name) &&
        !PyObject_SetAttrString(exception, "pid", pid))
        PyErr_SetObject(spawn_error, exception);
    Py_XDECREF(where);
    Py_XDECREF(exception);
    Py_XDECREF(name);
    Py_XDECREF(pid);
    return NULL;
}

/* A NULL-terminated array of the sequence's bytes objects, borrowed from it. Free with PyMem_Free. */
static char **
borrow_strings(PyObject *sequence, const char *what)
{
    Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence);
    char **strings = PyMem_Calloc((size_t)count + 1, sizeof *strings);
    if (!strings) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PySequence_Fast_GET_ITEM(sequence, i);
        if (!PyBytes_Check(item))
            PyErr_Format(PyExc_TypeError, "%s: expected bytes, got %.100s", what,
                         Py_TYPE(item)->tp_name);
        else if (!PyBytes_AsStringAndSize(item, &strings[i], NULL)) /* refuses NUL bytes */
            continue;
        PyMem_Free(strings);
        return NULL;
    }
    return strings;
}

static int
read_groups(PyObject *sequence, gid_t **groups, size_t *count)
{
    *count = (size_t)PySequence_Fast_GET_SIZE(sequence);
    *groups = PyMem_Calloc(*count + 1, sizeof **groups);
    if (!*groups)
        return PyErr_NoMemory(), -1;
    for (size_t i = 0; i < *count; i++) {
        unsigned long group = PyLong_AsUnsignedLong(PySequence_Fast_GET_ITEM(sequence, i));
        if (PyErr_Occurred())
            return -1;
        (*groups)[i] = (gid_t)group;
    }
    return 0;
}

static int
read_limits(PyObject *sequence, struct limit **limits, size_t *count)
{
    *count = (size_t)PySequence_Fast_GET_SIZE(sequence);
    *limits = PyMem_Calloc(*count + 1, sizeof **limits);
    if (!*limits)
        return PyErr_NoMemory(), -1;
    for (size_t i = 0; i < *count; i++) {
        struct limit *limit = &(*limits)[i];
        unsigned long long soft, hard;
        PyObject *item = PySequence_Fast_GET_ITEM(sequence, i);
        if (!PyArg_Parse(item, "(iKK):rlimits", &limit->resource, &soft, &hard))
            return -1;
        limit->values[0] = soft;
        limit->values[1] = hard;
    }
    return 0;
}

/* start_child() where the child has memory of its own: both see the plan all the same. */
static long
start_apart(struct plan *plan, int *pidfd)
{
    struct plan *shared = mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE,
                               MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        return -errno;
    *shared = *plan;
    long pid = start_child(shared, pidfd);
    *plan = *shared; /* the pointers in it mean the same on both sides */
    munmap(shared, sizeof *plan);
    return pid;
}

/* Reap a child that failed, which ends by itself. Whether it is: a debugger, which is told of the end
 * first, may never let it go. */
static int
reap_failed(pid_t pid, int pidfd)
{
    struct pollfd end = {.fd = pidfd, .events = POLLIN};
    const struct timespec time = {.tv_nsec = END_MILLISECONDS * 1000000L};
    sigset_t everything; /* no signal makes the time begin anew */
    sigfillset(&everything);
    ppoll(&end, 1, &time, &everything);
    siginfo_t reaped = {0}; /* waitpid(2) would tell of stops as well, were we the debugger */
    return waitid(P_PID, pid, &reaped, WEXITED | WNOHANG) != 0 || reaped.si_pid != 0;
}

/* Turn a plan into (pid, pidfd) or SpawnError. */
static PyObject *
run_plan(struct plan *plan)
{
    int pidfd = -1;
    long pid = plan->filter.len ? start_apart(plan, &pidfd) : start_child(plan, &pidfd);
    if (pid < 0)
        return raise_spawn_error("clone", (int)-pid, NULL, 0);
    if (!plan->error)
        return Py_BuildValue("(ii)", (int)pid, pidfd);
    int reaped = reap_failed((pid_t)pid, pidfd);
    close(pidfd);
    return raise_spawn_error(plan->step, plan->error, plan->path, reaped ? 0 : pid);
}

/* The effective set: all that is permitted, or of what it has now only what is kept. */
static long
set_effective(int all, uint64_t kept)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct sets[2];
    if (syscall(SYS_capget, &header, sets) < 0)
        return -1;
    for (int half = 0; half < 2; half++)
        sets[half].effective = all ? sets[half].permitted
                                   : sets[half].effective & (uint32_t)(kept >> 32 * half);
    return syscall(SYS_capset, &header, sets);
}

/* setfsuid(2) and setfsgid(2) say nothing of a failure; asked for an id that there is not, they tell
 * the present one. */
static long
set_file_id(long call, uint32_t id)
{
    syscall(call, id);
    if ((uint32_t)syscall(call, UINT32_MAX) == id)
        return 0;
    errno = EPERM;
    return -1;
}

/* act_as(uid, gid, groups, capabilities=-1): for this thread alone, hence not by libc: see .pyi */
static PyObject *
sys_act_as(PyObject *module, PyObject *args)
{
    long long uid, gid, capabilities = -1;
    PyObject *given, *fast;
    gid_t *groups = NULL;
    size_t count;
    int failed = 1;
    if (!PyArg_ParseTuple(args, "LLO|L:act_as", &uid, &gid, &given, &capabilities))
        return NULL;
    if (uid < 0 || uid >= UINT32_MAX || gid < 0 || gid >= UINT32_MAX)
        return PyErr_SetString(PyExc_ValueError, "uid and gid must be 0 to 2**32 - 2"), NULL;
    if (!(fast = PySequence_Fast(given, "groups")))
        return NULL;
    if (!read_groups(fast, &groups, &count)) {
        failed = set_effective(1, 0) < 0 || set_groups(count, groups, (gid_t)gid) < 0 ||
                 set_file_id(SYS_setfsgid, (uint32_t)gid) < 0 ||
                 set_file_id(SYS_setfsuid, (uint32_t)uid) < 0 || close_memory() < 0 ||
                 (capabilities >= 0 && set_effective(0, (uint64_t)capabilities) < 0);
        if (failed)
            os_error();
    }
    PyMem_Free(groups);
    Py_DECREF(fast);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

/* spawn(argv, env, *, candidates, cwd, fds, ...): see _guestsys.pyi */
static PyObject *
sys_spawn(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"argv",     "env",    "candidates",   "cwd",     "fds",   "uid",
                            "gid",      "groups", "session",      "tty",     "oom_score_adj",
                            "umask",    "cgroup_fd", "no_new_privs", "rlimits", "capabilities",
                            "seccomp",  "capability_sets", "enter_first",
                            "filter_first", NULL};
    enum { ARGV, ENV, CANDIDATES, GROUPS, LIMITS, SEQUENCES };
    static const char *const what[] = {"argv", "env", "candidates", "groups", "rlimits"};
    PyObject *given[SEQUENCES] = {NULL}, *fast[SEQUENCES] = {NULL}, *fds = NULL, *result = NULL;
    PyObject *given_sets = Py_None;
    struct capability_sets sets;
    struct plan plan = {.session = 1, .tty = -1, .cgroup_fd = -1, .capabilities = -1,
                        .step = "clone"};
    struct limit *limits = NULL;
    gid_t *groups = NULL;
    long long uid = 0, gid = 0, capabilities = -1;
    unsigned int mask = 022;
    int oom_score_adj = 0;
    char oom_text[16];
    const char *filter = NULL;
    Py_ssize_t filter_size = 0;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO|$OyO!LLOpiiIipOLy#Opp:spawn", names, &given[ARGV],
                                     &given[ENV], &given[CANDIDATES], &plan.cwd, &PyTuple_Type, &fds,
                                     &uid, &gid, &given[GROUPS], &plan.session, &plan.tty,
                                     &oom_score_adj, &mask, &plan.cgroup_fd, &plan.no_new_privs,
                                     &given[LIMITS], &capabilities, &filter, &filter_size,
                                     &given_sets, &plan.enter_first, &plan.filter_first))
        return NULL;
    if (!given[CANDIDATES] || !plan.cwd || !fds)
        return PyErr_SetString(PyExc_TypeError, "spawn needs candidates, cwd and fds"), NULL;
    if (!PyArg_ParseTuple(fds, "iii:fds", &plan.fds[0], &plan.fds[1], &plan.fds[2]))
        return NULL;
    if (given_sets != Py_None) {
        if (!PyArg_Parse(given_sets, "(KKKKK):capability_sets", &sets.bounding, &sets.permitted,
                         &sets.effective, &sets.inheritable, &sets.ambient))
            return NULL;
        plan.sets = &sets;
    }
    if (uid < 0 || uid >= UINT32_MAX || gid < 0 || gid >= UINT32_MAX)
        return PyErr_SetString(PyExc_ValueError, "uid and gid must be 0 to 2**32 - 2"), NULL;
    if ((size_t)filter_size % sizeof(struct sock_filter) ||
        (size_t)filter_size / sizeof(struct sock_filter) > BPF_MAXINSNS)
        return PyErr_SetString(PyExc_ValueError, "seccomp must be 0 to 4096 instructions"), NULL;

    for (int i = 0; i < SEQUENCES; i++) {
        fast[i] = given[i] ? PySequence_Fast(given[i], what[i]) : PyTuple_New(0);
        if (!fast[i])
            goto done;
    }
    if (!(plan.argv = borrow_strings(fast[ARGV], what[ARGV])) ||
        !(plan.env = borrow_strings(fast[ENV], what[ENV])) ||
        !(plan.candidates = borrow_strings(fast[CANDIDATES], what[CANDIDATES])) ||
        read_groups(fast[GROUPS], &groups, &plan.group_count) ||
        read_limits(fast[LIMITS], &limits, &plan.limit_count))
        goto done;
    snprintf(oom_text, sizeof oom_text, "%d", oom_score_adj);
    plan.oom_score_adj = oom_text;
    plan.groups = groups;
    plan.limits = limits;
    plan.umask = mask;
    plan.capabilities = capabilities;
    plan.filter.len = (unsigned short)((size_t)filter_size / sizeof(struct sock_filter));
    plan.filter.filter = (struct sock_filter *)filter; /* the kernel only reads it */
    plan.uid = (uid_t)uid;
    plan.gid = (gid_t)gid;
    result = run_plan(&plan);
done:
    for (int i = 0; i < SEQUENCES; i++)
        Py_XDECREF(fast[i]);
    PyMem_Free(plan.argv);
    PyMem_Free(plan.env);
    PyMem_Free(plan.candidates);
    PyMem_Free(groups);
    PyMem_Free(limits);
    return result;
}

/* fork(): os.fork() also reads /proc/self/stat, to warn of threads: see .pyi */
static PyObject *
sys_fork(PyObject *module, PyObject *unused)
{
    PyOS_BeforeFork();
    pid_t pid = fork();
    int error = errno;
    if (pid == 0)
        PyOS_AfterFork_Child();
    else
        PyOS_AfterFork_Parent();
    errno = error;
    return pid < 0 ? os_error() : PyLong_FromLong(pid);
}

static PyMethodDef guestsys_methods[] = {
    {"act_as", sys_act_as, METH_VARARGS, NULL},
    {"finit_module", sys_finit_module, METH_VARARGS, NULL},
    {"fork", sys_fork, METH_NOARGS, NULL},
    {"ipc_objects", sys_ipc_objects, METH_VARARGS, NULL},
    {"ipc_remove", sys_ipc_remove, METH_VARARGS, NULL},
    {"let_go", sys_let_go, METH_VARARGS, NULL},
    {"mount", sys_mount, METH_VARARGS, NULL},
    {"mount_setattr", sys_mount_setattr, METH_VARARGS, NULL},
    {"openat2", sys_openat2, METH_VARARGS, NULL},
    {"pivot_root", sys_pivot_root, METH_VARARGS, NULL},
    {"prctl", sys_prctl, METH_VARARGS, NULL},
    {"reboot", sys_reboot, METH_VARARGS, NULL},
    {"reset_signals", sys_reset_signals, METH_NOARGS, NULL},
    {"setns", sys_setns, METH_VARARGS, NULL},
    {"spawn", _PyCFunction_CAST(sys_spawn), METH_VARARGS | METH_KEYWORDS, NULL},
    {"umount2", sys_umount2, METH_VARARGS, NULL},
    {"unshare", sys_unshare, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static int
fill_guestsys(PyObject *module)
{
    spawn_error = PyErr_NewException("_guestsys.SpawnError", PyExc_OSError, NULL);
    return spawn_error ? PyModule_AddObjectRef(module, "SpawnError", spawn_error) : -1;
}

static PyModuleDef_Slot guestsys_slots[] = {
    {Py_mod_exec, fill_guestsys},
    {0, NULL},
};

static struct PyModuleDef guestsys_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_guestsys",
    .m_methods = guestsys_methods,
    .m_slots = guestsys_slots,
};

#ifdef GUESTSYS_ALONE
PyMODINIT_FUNC
#else
static PyObject *
#endif
PyInit__guestsys(void)
{
    return PyModuleDef_Init(&guestsys_module);
}

#ifndef GUESTSYS_ALONE

/* ---- the program -------------------------------------------------------------------------- */

extern const struct _frozen guest_frozen[]; /* generated: every Python module of the guest */
extern PyObject *PyInit__cmsgpack(void);    /* msgpack's C packer */

/*
 * Nothing may be opened as 0, 1 or 2 by accident: prints would go into it. Where /dev/null is
 * missing too, half of a pipe reads as end of file and refuses writes with EPIPE.
 */
static void
fill_standard_fds(void)
{
    for (int fd = 0; fd <= 2; fd++) {
        if (fcntl(fd, F_GETFD) != -1 || errno != EBADF)
            continue;
        if (open("/dev/null", O_RDWR) == fd)
            continue;
        int ends[2];
        if (pipe2(ends, 0))
            continue;
        int keep = fcntl(ends[fd == 0 ? 0 : 1], F_DUPFD, 3);
        close(ends[0]);
        close(ends[1]);
        dup2(keep, fd);
        close(keep);
    }
}

/*
 * CPython refuses to start when neither getrandom() nor /dev/urandom can give a hash seed, which is
 * how an early boot without a hardware generator looks. The kernel hands every program 16 random
 * bytes at exec that cost no wait: good enough for PID 1, whose input is trusted at that point.
 */
static void
choose_hash_seed(PyConfig *config)
{
    uint32_t probe;
    config->use_hash_seed = 0;
    if (getrandom(&probe, sizeof probe, GRND_NONBLOCK) == (ssize_t)sizeof probe)
        return;
    const void *bytes = (const void *)getauxval(AT_RANDOM);
    if (bytes == NULL)
        return;
    memcpy(&probe, bytes, sizeof probe);
    config->use_hash_seed = 1;
    config->hash_seed = probe;
}

static PyStatus
configure(PyConfig *config, int argc, char **argv)
{
    wchar_t **const empty[] = {
        &config->executable,  &config->base_executable, &config->prefix,
        &config->base_prefix, &config->exec_prefix,     &config->base_exec_prefix,
        &config->stdlib_dir,
    };
    PyStatus status;
    PyConfig_InitIsolatedConfig(config); /* no environment, no user site, no script's folder */
    config->site_import = 0;
    config->write_bytecode = 0;
    config->pathconfig_warnings = 0;
    config->optimization_level = GUEST_OPTIMIZATION;
    config->use_frozen_modules = 1;
    config->parse_argv = 0;
    config->install_signal_handlers = 1; /* SIGINT raises, SIGPIPE is ignored */
    config->module_search_paths_set = 1; /* sys.path = []: only what is in this binary */
    choose_hash_seed(config);
    for (size_t i = 0; i < sizeof empty / sizeof *empty; i++) {
        status = PyConfig_SetString(config, empty[i], L"");
        if (PyStatus_Exception(status))
            return status;
    }
    status = PyConfig_SetString(config, &config->program_name, L"microguest");
    if (PyStatus_Exception(status))
        return status;
    status = PyConfig_SetString(config, &config->home, L"/");
    if (PyStatus_Exception(status))
        return status;
    return PyConfig_SetBytesArgv(config, argc, argv);
}

static PyStatus
start_interpreter(int argc, char **argv)
{
    PyPreConfig before;
    PyConfig config;
    PyStatus status;
    PyPreConfig_InitIsolatedConfig(&before);
    /* musl's malloc maps and unmaps memory for each larger object: a sixth of the start. It gives
     * everything back at once, though, which counts for the agent and what its hosts send it. */
    if (argc > 0 && strcmp(argv[0], "agent") != 0)
        before.allocator = PYMEM_ALLOCATOR_MIMALLOC;
    before.utf8_mode = 1; /* bytes that are not UTF-8 survive as surrogates, in any locale */
    before.configure_locale = 0;
    before.coerce_c_locale = 0;
    status = Py_PreInitialize(&before);
    if (PyStatus_Exception(status))
        return status;
    PyImport_FrozenModules = guest_frozen;
    if (PyImport_AppendInittab("msgpack._cmsgpack", PyInit__cmsgpack) ||
        PyImport_AppendInittab("_guestsys", PyInit__guestsys))
        return PyStatus_NoMemory();
    status = configure(&config, argc, argv);
    if (!PyStatus_Exception(status))
        status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    return status;
}

/* What ps shows: the kernel takes the file's name, which is that of PID 1 for the agent too. */
static void
name_process(const char *name)
{
    const char *slash = name ? strrchr(name, '/') : NULL;
    if (name)
        prctl(PR_SET_NAME, slash ? slash + 1 : name, 0, 0, 0);
}

/* PID 1 and the agent know the machine's token. The launcher of namespaces is its user's, as whom it
 * writes files of its own in /proc: they would be root's. */
static void
keep_memory_private(int argc, char **argv)
{
    if (getpid() == 1 || argc < 2 || strcmp(argv[1], "namespaces") != 0)
        close_memory();
}

int
main(int argc, char **argv)
{
    PyStatus status;
    keep_memory_private(argc, argv);
    name_process(argv[0]);
    fill_standard_fds();
    status = start_interpreter(argc, argv);
    if (PyStatus_Exception(status))
        Py_ExitStatusException(status);
    if (PyImport_ImportFrozenModule("__main__") < 0) {
        PyErr_Print(); /* a SystemExit ends the process here with its status */
        Py_FinalizeEx();
        return 1;
    }
    return Py_FinalizeEx() < 0 ? 120 : 0;
}

#endif /* GUESTSYS_ALONE */
