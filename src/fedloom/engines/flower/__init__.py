"""The same rounds across machines, on Flower.

    fedloom run ─launch→ SuperLink ─→ ServerApp (server: rounds, checkpoints, who answered)
                                          │  payload: one opaque array a message
    SuperNode ─→ ClientApp (client: a relay, started anew for every message) ─unix socket→ fedloom worker (site.desk)

Nothing outside this package imports flwr. `client` and `payload` load no torch.
"""
