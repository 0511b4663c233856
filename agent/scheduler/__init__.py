"""The central scheduler: it knows the fleet, queues and dispatches requests, and keeps as many instances as wanted.

| room | idea |
|---|---|
| `fleet.py` | agents' load streams -> the table of nodes and instances, and events for the dispatcher |
| `desk.py` | drives `core/dispatch/dispatcher.py`: the one caller of its `step`, and what its effects mean |
| `wakes.py` | Wake calls to agents, bounded per node |
| `links.py` | one gRPC channel per agent |
| `ingresses.py` | one pool of HTTP connections per agent |
| `routes.py` | which function a request is for |
| `gateway.py` | one request from the client to an instance and back |
| `functions.py` | what is deployed, and the one way to change it |
| `deploy_rules.py` | what a deploy must keep to |
| `store.py` | what must survive the scheduler: functions and known nodes, in SQL |
| `provisioner.py` | drives `core/provisioning/reconcile.py`: creates and drains instances |
| `progress.py` | what it knows of a function's instances beyond the fleet's table |
| `node_scheduling.py` | what operators ask of nodes: cordon, drain |
| `node_views.py` | the fleet as `core/provisioning/placement.py` sees it |
| `usage*.py` | the agents' usage windows: taken in once, summed, priced |
"""
