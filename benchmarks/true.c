/* A process that does as little as a process can: what every contender starts. */
int main(void)
{
    return 0;
}
