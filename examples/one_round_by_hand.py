"""One round by hand: two clients and a server, real payloads, no model. The training step is made up."""

import torch

import fedloom

SHAPES = {"q_proj": (12, 8), "v_proj": (6, 8)}  # module → (out features, in features)
RANKS = {"q_proj": 4, "v_proj": 4}


def train(state: fedloom.State, round: int, seed: int) -> fedloom.Trained:
    """A stand-in for training: B moves by a little noise, another one for every client and round."""
    noise = torch.Generator().manual_seed(seed)
    after = state.adapter.map(
        lambda pair: fedloom.LoraPair(pair.A, pair.B + 0.1 * torch.randn(pair.B.shape, generator=noise))
    )
    return fedloom.Trained(after, num_examples=100, loss=1.0)


def main() -> None:
    """What travels, and that everybody ends with the same bits."""
    job = fedloom.Job(fedloom.build("fedsrd"), seed=0, quantize=fedloom.quantize("int4"))
    adapter = fedloom.initial_state(SHAPES, RANKS, seed=0)  # A drawn from the seed, B zero
    server = fedloom.start(job, adapter)
    clients = {"ada": fedloom.start(job, adapter), "bob": fedloom.start(job, adapter)}

    # Every client trains and says what changed.
    turns = {name: fedloom.client_turn(job, name, state, [], train, round=1) for name, state in clients.items()}
    uploads = {name: turn.payload for name, turn in turns.items()}
    print({name: len(payload) for name, payload in uploads.items()}, "bytes up")
    print(fedloom.describe(uploads["ada"]))

    # The server combines the payloads into one broadcast, and applies that itself.
    turn = fedloom.server_turn(job, server, uploads, round=1)
    print(len(turn.payload), "bytes down")

    # Every client applies the broadcast.
    clients = {name: fedloom.accept(job, turns[name].state, turn.payload) for name in clients}
    print("same bits:", all(state.digest == turn.state.digest for state in clients.values()))

    # The same in one call.
    federation = fedloom.Federation(job, adapter, clients={"ada": None, "bob": None})
    result = federation.round(train)
    print("same payloads:", result.uploads == uploads and result.broadcast == turn.payload)


if __name__ == "__main__":
    main()
