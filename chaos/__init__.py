"""Random faults over real jobs, seeded: no job is lost, none is done twice. ``make chaos N=200 SEED=7``; docs/chaos.md.

town        a zone that can be hurt: workers, broker, stores, vCenter, publisher
mix         the jobs that are asked for, and what must be true once they have ended
faults      what goes wrong
invariants  what must be true after every round, seen with other eyes than the product's
rounds      one run
table       what it prints
"""
