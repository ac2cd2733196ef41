"""Seeded random faults during real jobs: no job is lost, and none runs twice. ``make chaos N=200 SEED=7``.

docs/explanation/chaos.md describes the program. The modules:

- ``zone``: the zone under test: workers, broker, stores, vCenter, publisher
- ``workload``: the submitted jobs, and the data that must exist when they have ended
- ``faults``: the faults
- ``invariants``: the checks after every round, which avoid the product's own code where possible
- ``rounds``: one run
- ``table``: the printed results
"""
