"""Flow control as a pure function of calls and time: the theory.

**The problem.** A model server runs a batch of requests and queues the rest itself, in order of
arrival. Its queue knows neither priority nor tenant, and a request that waits in it can no longer
go to another server. So a pool of servers is fast as long as it is not full, and unfair as soon as
it is. Here requests wait in front of the pool instead, and an endpoint is chosen only when it has a
free slot: late binding, as in Sparrow (Ousterhout et al., SOSP 2013). One queue for all servers
also never leaves one idle while work waits for another (join-idle-queue has the same aim: Lu et
al., 2011).

**Capacity** is counted in slots. A limit says how many an endpoint has; it is given, or learned
from what scrapes show (limits/). By Little's law (1961) what is in a server equals rate times time,
so a limit on what is in it bounds the time spent there. Too low a limit wastes throughput, too high
a one moves the queue back into the server: the trade-off of TCP congestion control, from which the
search for the limit is taken. Requests of others take slots too, as far as scrapes show them. An
endpoint that fails frees its slots at once and would attract all traffic, so it is left out until a
trial succeeds (health.py).

**The next request** is decided on three levels, outermost first.

1. *Bands* are strictly ordered: nothing is dispatched from a band while a higher one has a request
that could use the slot. That is what criticality means, and it starves lower bands by design; their
TTL tells clients so. Two settings bend it: a band with a reserved share gets that part of the
dispatches while it waits, and one with a ceiling takes no slot above it beyond that part.
2. *Flows* share a band by its fairness policy (fairness/). The ideal is max-min fairness: no flow
gets more until every flow that wants more has as much (Bertsekas and Gallager, Data Networks, 1992,
6.5). Fair queueing comes within one request of it by always serving the flow of the lowest rank,
where a rank is the number of a turn (Nagle, RFC 970), virtual time (Demers, Keshav and Shenker,
1989; Goyal, Vin and Cheng, 1996), or a counter of tokens (Sheng et al., OSDI 2024). A policy here
is therefore arithmetic on ranks; a flow that has nothing waiting earns no credit. Flows may have
flows inside, tenants in a model or models in a tenant: then each outer flow has a policy of its own
for what it gets, as in hierarchical packet fair queueing (Bennett and Zhang, SIGCOMM 1996).
3. *Requests* of one flow go by its ordering (ordering/).

The proxy may restrict a request to a subset of endpoints. A flow's requests wait in one lane per
subset, and the flow's turn counts for all its lanes together: hints must not buy turns. The policy
is *work-conserving*: a lane of which no endpoint has a free slot is passed over and parked, so that
a blocked flow holds up no other and costs nothing until one of its endpoints gets a slot. A flow
keeps its rank meanwhile, and so has its turn as soon as it can use it (lanes.py).

**Where to** is decided last, for the request whose turn it is: filters, scorers, a picker
(selection/). The default goes where the prompt's beginning is cached, as long as that pays, evens
out relative occupancy otherwise, and draws among equals; the least loaded of all is at least as
good as the better of two choices (Mitzenmacher, 2001).

**Overload.** A queue turns a burst into delay but cannot serve a lasting overload, so it is bounded
in number, bytes and time. Requests are *rejected* on arrival when a cap of pool, band or flow is
reached, unless their band may displace what waits in lower ones, and *evicted* when they are
displaced or their TTL or own deadline passes. Each refusal carries the time in which what waits
will have drained at the measured rate. Each request gets exactly one outcome.

**The code.** No I/O, no clock, no logging, no randomness of its own: every entry point takes `now`
in monotonic seconds, and the random source is passed in. The same calls give the same decisions,
which is what lets tests run in virtual time and replay what they have seen. One caller, so no
locks. No operation takes longer than O(log n) in requests, flows, lanes, or bands; choosing an
endpoint looks at those that have a free slot.

The reading order is terms, controller, dispatching, expiry, charging, bands, levels, lanes, flows,
fairness, ordering, tracked, prefixes, endpoints, limits, selection, observation. The model for this
text, and for flow control in front of a server, is Kubernetes' API Priority and Fairness
(KEP-1040), whose queues shuffle-shard flows where these are one a flow.
"""
