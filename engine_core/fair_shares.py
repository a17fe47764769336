"""Who was served how much: the books by which waiting requests take turns.

Every tenant has a virtual time, the tokens that it was served, and whoever has the least is next (Sheng et al.,
"Fairness in Serving Large Language Models", OSDI 2024). Tenants form a tree of two levels, keys and the users of each:
keys take turns, and within a key its users do. Whoever comes back after a pause starts where those are who stayed, so
nobody saves up turns. A request is charged for its prompt and for the output that its tenant's requests usually have
when it starts, and for the difference when it is known.

Virtual times only grow: what was charged too much is credit towards what comes next.
"""

from __future__ import annotations

from collections import OrderedDict

MAX_IDLE_TENANTS = 1024
"""Tenants without requests that are remembered because they had more than the others; clients may name any number."""
OUTPUT_WEIGHT = 0.125
"""Weight of the last output in the mean of a tenant's outputs."""


class Account:
    """What one tenant was served; that of a key holds those of its users."""

    __slots__ = ("children", "credit", "floor", "idle", "mean_output", "name", "num_active", "parent", "served")

    def __init__(self, name: str, parent: Account | None) -> None:
        self.name = name
        self.parent = parent
        self.children: dict[str, Account] = {}
        self.idle: OrderedDict[str, Account] = OrderedDict()
        """Children without requests, the one that has had none for the longest time first."""
        self.served = 0.0
        """Virtual time in tokens."""
        self.floor = 0.0
        """Virtual time of the child that had the last turn: a child that comes back starts there."""
        self.credit = 0.0
        """Tokens that were charged and not served."""
        self.mean_output: float = 0.0 if parent is None else parent.mean_output
        """Tokens of its recent outputs."""
        self.num_active = 0
        """Requests that wait or run."""

    def charge(self, tokens: float) -> None:
        """Counts tokens here and above; fewer than none give credit."""
        account: Account | None = self
        while account is not None:
            due = tokens - account.credit
            account.served += max(due, 0.0)
            account.credit = max(-due, 0.0)
            account = account.parent

    def take_turn(self) -> None:
        """One of its requests is next."""
        account = self
        while account.parent is not None:
            account.parent.floor = max(account.parent.floor, account.served)
            account = account.parent

    def note_output(self, num_tokens: int) -> None:
        """Takes an output into account for what the next one is expected to be."""
        account: Account | None = self
        while account is not None:
            account.mean_output += (num_tokens - account.mean_output) * OUTPUT_WEIGHT
            account = account.parent


class FairShares:
    """The accounts of all tenants. Bounded: tenants without requests are forgotten as soon as that changes nothing."""

    def __init__(self) -> None:
        self.root = Account("", None)

    def open(self, tenant: tuple[str, ...]) -> Account:
        """The account of a tenant that has one more request.

        Args:
            tenant: Names from the key to the user.
        """
        account = self.root
        account.num_active += 1
        for name in tenant:
            child = account.children.get(name)
            if child is None:
                child = account.children[name] = Account(name, account)
            if not child.num_active:
                account.idle.pop(name, None)
                child.served = max(child.served, account.floor)
            child.num_active += 1
            account = child
        return account

    def close(self, account: Account) -> None:
        """A request of the tenant is over."""
        node = account
        while node.parent is not None:
            node.num_active -= 1
            if not node.num_active:
                self._rest(node, node.parent)
            node = node.parent
        node.num_active -= 1
        if not node.num_active:  # nobody competes: all begin anew
            mean = node.mean_output
            self.root = Account("", None)
            self.root.mean_output = mean

    @staticmethod
    def _rest(child: Account, parent: Account) -> None:
        parent.idle[child.name] = child
        while parent.idle:
            name, oldest = next(iter(parent.idle.items()))
            if oldest.served > parent.floor and len(parent.idle) <= MAX_IDLE_TENANTS:
                return
            del parent.idle[name]
            del parent.children[name]

    @property
    def num_accounts(self) -> int:
        """Keys and users that are remembered."""
        return sum(1 + len(key.children) for key in self.root.children.values())
