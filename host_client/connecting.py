"""From a URL, or the name of a machine, to its agent."""

from microguest.host_client.client.agent import Agent
from microguest.host_client.values import check_flag, check_seconds, text

__all__ = ["agent_at", "connect"]


def connect(
    url: str, *, token: str | None = None, timeout: float = 10.0, step_clock: bool = True
) -> Agent:
    """Reach the agent at `url` and check that it takes the token.

    `url`: vsock://CID:PORT, hybrid:///PATH[?port=PORT], unix:///PATH, or the name of a machine of
    this user, which needs no token. `timeout`: seconds for this and for every later small request.
    `step_clock`: set the guest's clock by ours whenever it is found to be more than 0.1 s out.
    A guest that is still booting is waited for; a socket that nobody serves is an error at once.
    Raises ConnectError; Unauthorized for a wrong token.
    """
    check_flag(step_clock, "step_clock")
    agent = agent_at(url, token=token, timeout=timeout)
    agent.driver.keeps_clock = step_clock
    try:
        agent.ping()
    except BaseException:
        agent.close()
        raise
    return agent


def agent_at(url: str, *, token: str | None = None, timeout: float = 10.0) -> Agent:
    """As `connect`, without dialling yet."""
    check_seconds(timeout, "timeout")  # before a machine is looked for
    if "://" in text(url, "url"):
        return Agent.at(url, token=token, timeout=timeout)
    from microguest.host_client.machines.find import find  # only here, for what it imports

    return find(url).agent(timeout=timeout)
