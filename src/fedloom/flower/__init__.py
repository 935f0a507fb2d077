"""The same rounds across machines, on Flower.

    fedloom run ─launch→ SuperLink ─→ ServerApp (server: rounds, checkpoints, who answered)
                                          │  payload: one opaque array a message
    SuperNode ─→ ClientApp (client: a relay, started anew for every message) ─unix socket→ fedloom worker (site.desk)

    fedloom run (simulation: rounds) ─pipe→ Flower's Simulation Runtime (runtime) ─→ Ray's processes (actors: all desks)

Nothing outside this package imports flwr. `client`, `payload` and `runtime` load no torch.
"""
