"""What a user is told when the Hugging Face hub does not give the weights that were asked for: one line, and the mend.

with explained("encoder uni2-h", "MahmoodLab/UNI2-h", licence="cc-by-nc-nd-4.0", gated=True):
    hf_hub_download(...)
"""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import errors as hub_errors


@contextmanager
def explained(
    what: str,
    repository: str,
    *,
    licence: str | None = None,
    gated: bool = False,
    instead: str = "that holds config.json and model.safetensors",
) -> Iterator[None]:
    """Turn errors of the hub into one line each.

    Args:
        what: the thing that is opened, as the message names it.
        repository: `org/name` on the hub.
        licence: of the weights, if known.
        gated: whether the repository is known to ask for its terms to be accepted.
        instead: which local folder would do as well.

    Raises:
        PermissionError: the hub asks for terms to be accepted, or for another token.
        FileNotFoundError: there is no such repository or file, or it is private.
        ConnectionError: the weights are neither in the local cache nor can the hub be reached.
    """
    how = _how_to_get_access(repository, licence)
    try:
        yield
    except (hub_errors.HfHubHTTPError, hub_errors.EntryNotFoundError, hub_errors.HFValidationError) as error:
        status = _refusal(error)
        if _is_gate(error) or (gated and status in (401, 403)):
            raise PermissionError(f"{what} is gated: {how}") from error
        if isinstance(error, hub_errors.LocalEntryNotFoundError) and status is None:
            raise _unreachable(what, instead, how if gated else None) from error
        if status == 403:
            raise PermissionError(
                f"the hub refuses {what} to your token (403): give the token the right to read gated repositories at "
                f"https://huggingface.co/settings/tokens, then {how}"
            ) from error
        missing = (hub_errors.RepositoryNotFoundError, hub_errors.EntryNotFoundError, hub_errors.HFValidationError)
        if not isinstance(error, missing) and status != 401:
            raise _unreachable(what, instead, None) from error
        raise FileNotFoundError(
            f"no {what}: neither a folder here nor a model on the hub that you may see; if {repository} is private, "
            "run `hf auth login` or set HF_TOKEN"
        ) from error
    except (hub_errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise _unreachable(what, instead, how if gated else None) from error


def _how_to_get_access(repository: str, licence: str | None) -> str:
    terms = f"its licence ({licence})" if licence else "its licence"
    return (
        f"accept {terms} at https://huggingface.co/{repository} and wait until access is granted, "
        "then run `hf auth login` or set HF_TOKEN"
    )


def _unreachable(what: str, instead: str, how_to_get_access: str | None) -> ConnectionError:
    gate = f"; it is gated, so where there is a network {how_to_get_access}" if how_to_get_access else ""
    return ConnectionError(
        f"the weights of {what} are not in the local cache and the hub cannot be reached: check the network, or give a "
        f"local folder {instead}{gate}"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from: the hub's client hides a refusal behind `LocalEntryNotFoundError`."""
    seen = set()
    while error is not None and id(error) not in seen:  # a cause that is raised again from its effect makes a ring
        seen.add(id(error))
        yield error
        error = error.__cause__


def _is_gate(error: BaseException) -> bool:
    return any(isinstance(cause, hub_errors.GatedRepoError) for cause in _causes(error))


def _refusal(error: BaseException) -> int | None:
    """401 or 403 if the hub answered with one of them, else None."""
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            return status
    return None
