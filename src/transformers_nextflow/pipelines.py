"""transformers pipelines of NextFlow."""


def register_pipelines(registry) -> None:
    pass
