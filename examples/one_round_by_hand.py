"""One round by hand: two clients and a server, real payloads, no model. The training step is made up."""

import torch

import fedloom

SHAPES = {"q_proj": (12, 8), "v_proj": (6, 8)}
RANK = 4


def first_adapter(seed: int) -> fedloom.LoraState:
    """A drawn from a seed, B zero: the change of weight B A begins at zero."""
    generator = torch.Generator().manual_seed(seed)
    return fedloom.LoraState(
        {
            module: fedloom.LoraPair(torch.randn(RANK, n, generator=generator), torch.zeros(m, RANK))
            for module, (m, n) in SHAPES.items()
        }
    )


def train(state: fedloom.State, round: int, seed: int) -> fedloom.Trained:
    """A stand-in for training: both factors move by a little noise."""
    generator = torch.Generator().manual_seed(seed % 2**63)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.1 * torch.randn(tensor.shape, generator=generator)

    pairs = {module: fedloom.LoraPair(moved(pair.A), moved(pair.B)) for module, pair in state.adapter.items()}
    return fedloom.Trained(fedloom.LoraState(pairs), num_examples=100, loss=1.0)


def main() -> None:
    """What travels, and that everybody ends with the same bits."""
    job = fedloom.Job(fedloom.build("fedsrd"), seed=0, quantize=lambda values, seed: values)
    server = fedloom.start(job, first_adapter(seed=0))
    clients = {"ada": server, "bob": server}

    turns = {name: fedloom.client_turn(job, name, state, [], train, round=1) for name, state in clients.items()}
    payloads = {name: turn.payload for name, turn in turns.items()}
    for name, payload in payloads.items():
        sent = {tensor.name: f"{tensor.values} of {tensor.shape}" for tensor in fedloom.describe(payload).tensors}
        print(f"{name} sends {len(payload)} bytes: {sent}")

    result = fedloom.server_turn(job, server, payloads, round=1)
    print(f"the server broadcasts {len(result.payload)} bytes")

    # A client's next turn begins with the broadcast: then it holds what the server holds.
    again = {
        name: fedloom.client_turn(job, name, turn.state, [result.payload], train, round=2)
        for name, turn in turns.items()
    }
    print("same bits:", all(turn.state.digest == result.state.digest for turn in again.values()))


if __name__ == "__main__":
    main()
