/* As true.c, without a libc: glibc's start asks the CPU about itself by CPUID, and in a virtual
 * machine each of those is a trip to the hypervisor. With this one, a start costs what it costs the
 * kernel. */
#include <sys/syscall.h>

void _start(void)
{
#if defined(__x86_64__)
    __asm__ volatile("syscall" : : "a"(SYS_exit_group), "D"(0));
#elif defined(__aarch64__)
    register long number __asm__("x8") = SYS_exit_group;
    register long status __asm__("x0") = 0;
    __asm__ volatile("svc 0" : : "r"(number), "r"(status));
#else
#error "write the exit_group system call of this architecture here"
#endif
    __builtin_unreachable();
}
