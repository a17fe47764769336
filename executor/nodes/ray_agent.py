"""The actor that Ray places on a machine: it runs the machine's agent as a child process, and does nothing else."""

from __future__ import annotations

from executor.process import ChildProcess

AGENT_MODULE = "api.ray_agent"
"""The module that an agent's process runs."""


class AgentActor:
    """Of one machine."""

    def run(self, message: bytes) -> int:
        """Runs the agent until it ends, or until this process does.

        Args:
            message: ``AgentLaunch``, encoded.

        Returns:
            The exit code.
        """
        return ChildProcess(AGENT_MODULE, message).wait()
