/*
 * The guest's C: the program's entry point and the module _guestsys.
 *
 * main() starts the interpreter with nothing from outside: no environment, no search path, no site,
 * every module from the frozen table that the build generates. It must work as PID 1 before anything
 * is mounted, and in a root that is empty.
 *
 * _guestsys has the system calls that PID 1 and the agent need and CPython does not offer. Each
 * function is one call; policy is in Python. Errors are OSError with errno.
 */
#define _GNU_SOURCE
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
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

static PyMethodDef guestsys_methods[] = {
    {"mount", sys_mount, METH_VARARGS, NULL},
    {"pivot_root", sys_pivot_root, METH_VARARGS, NULL},
    {"reboot", sys_reboot, METH_VARARGS, NULL},
    {"umount2", sys_umount2, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef guestsys_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_guestsys",
    .m_methods = guestsys_methods,
};

static PyObject *
PyInit__guestsys(void)
{
    return PyModuleDef_Init(&guestsys_module);
}

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

int
main(int argc, char **argv)
{
    PyStatus status;
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
