"""Fair sharing: accounts of the service each tenant got, by which waiting requests take turns.

Every tenant has a virtual time, the tokens it was served, and the tenant with the least is next (Sheng et al.,
"Fairness in Serving Large Language Models", OSDI 2024). Tenants form a tree of two levels, keys and the users of each:
keys take turns, and within a key its users do. A tenant that returns after a pause starts level with the active ones,
so that pauses earn no extra turns. A request is charged for its prompt and its tenant's average output when it starts,
and for the difference once it is known.

Virtual times only grow: overcharges become credit towards later requests.
"""

from __future__ import annotations

from collections import OrderedDict

MAX_IDLE_TENANTS = 1024
"""Maximum idle tenants remembered because they were served more than others; clients may invent any number of names."""
OUTPUT_WEIGHT = 0.125
"""Weight of the latest output in the moving average of a tenant's outputs."""


class Account:
    """The account of one tenant. A key's account has its users' accounts as children."""

    __slots__ = ("children", "credit", "floor", "idle", "mean_output", "name", "num_active", "parent", "served")

    def __init__(self, name: str, parent: Account | None) -> None:
        self.name = name
        self.parent = parent
        self.children: dict[str, Account] = {}
        self.idle: OrderedDict[str, Account] = OrderedDict()
        """Children without requests, longest idle first."""
        self.served = 0.0
        """Virtual time in tokens."""
        self.floor = 0.0
        """Virtual time of the child that had the last turn: a returning child starts there."""
        self.credit = 0.0
        """Tokens charged but not served."""
        self.mean_output: float = 0.0 if parent is None else parent.mean_output
        """Moving average of output lengths in tokens."""
        self.num_active = 0
        """Number of waiting and running requests."""

    def charge(self, tokens: float) -> None:
        """Charges tokens here and to all parents; a negative number gives credit."""
        account: Account | None = self
        while account is not None:
            due = tokens - account.credit
            account.served += max(due, 0.0)
            account.credit = max(-due, 0.0)
            account = account.parent

    def take_turn(self) -> None:
        """Records that one of its requests has the turn."""
        account = self
        while account.parent is not None:
            account.parent.floor = max(account.parent.floor, account.served)
            account = account.parent

    def note_output(self, num_tokens: int) -> None:
        """Updates the expected output length."""
        account: Account | None = self
        while account is not None:
            account.mean_output += (num_tokens - account.mean_output) * OUTPUT_WEIGHT
            account = account.parent


class FairShares:
    """The accounts of all tenants. Bounded: idle tenants are forgotten as soon as that makes no difference."""

    def __init__(self) -> None:
        self.root = Account("", None)

    def open(self, tenant: tuple[str, ...]) -> Account:
        """The account of a tenant, for one more request.

        Args:
            tenant: Names, from key to user.
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
        """Records the end of a tenant's request."""
        node = account
        while node.parent is not None:
            node.num_active -= 1
            if not node.num_active:
                self._rest(node, node.parent)
            node = node.parent
        node.num_active -= 1
        if not node.num_active:  # no competition: start afresh
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
        """Number of keys and users remembered."""
        return sum(1 + len(key.children) for key in self.root.children.values())
