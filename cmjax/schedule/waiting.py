"""Requests that wait for a place, in the order they will be admitted."""

from collections import OrderedDict, defaultdict
from collections.abc import Iterator

from cmjax.schedule.request import Request


class WaitingQueue:
    """Requests go by priority; of one priority, tenants take turns by what they have been served (prompt and generated
    tokens), each tenant's requests in the order they came.
    """

    def __init__(self) -> None:
        self._by_priority: dict[int, dict[str, OrderedDict[Request, None]]] = {}
        self._served: dict[str, float] = defaultdict(float)
        self._num_requests = 0

    def __len__(self) -> int:
        return self._num_requests

    def __iter__(self) -> Iterator[Request]:
        for tenants in self._by_priority.values():
            for queue in tenants.values():
                yield from queue

    def submit(self, request: Request) -> None:
        """Take a new request."""
        active = {tenant for tenants in self._by_priority.values() for tenant in tenants}
        if request.tenant not in active:
            # One that asked for nothing has saved up nothing.
            least = min((self._served[tenant] for tenant in active), default=0.0)
            self._served[request.tenant] = max(self._served[request.tenant], least)
        self.add(request)

    def add(self, request: Request, *, first: bool = False) -> None:
        """Put a request at the end of its tenant's, or before them."""
        queue = self._by_priority.setdefault(request.priority, {}).setdefault(request.tenant, OrderedDict())
        queue[request] = None
        if first:
            queue.move_to_end(request, last=False)
        self._num_requests += 1

    def remove(self, request: Request) -> None:
        """Take a request out."""
        tenants = self._by_priority[request.priority]
        del tenants[request.tenant][request]
        self._num_requests -= 1
        if not tenants[request.tenant]:
            del tenants[request.tenant]
        if not tenants:
            del self._by_priority[request.priority]

    def served(self, tenant: str, num_tokens: int) -> None:
        """A tenant has got so many tokens."""
        self._served[tenant] += num_tokens

    def first(self) -> Request | None:
        """The one whose turn it is."""
        if not self._by_priority:
            return None
        tenants = self._by_priority[min(self._by_priority)]
        firsts = {tenant: next(iter(queue)) for tenant, queue in tenants.items()}
        tenant = min(firsts, key=lambda one: (self._served[one], firsts[one].times.arrival, one))
        return firsts[tenant]
