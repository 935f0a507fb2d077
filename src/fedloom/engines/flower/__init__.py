"""The same rounds across machines, on Flower.

    fedloom run ─launch→ SuperLink ─→ ServerApp (server: rounds, checkpoints, who answered)
                                          │  payload: one opaque array a message
    SuperNode ─→ ClientApp (client: a relay, started anew for every message) ─unix socket→ fedloom worker (site.desk)

    fedloom run ─simulation→ Flower's Simulation Runtime ─→ Ray's processes (actors: desks of all sites)

Nothing outside this package imports flwr. `client` and `payload` load no torch.
"""
