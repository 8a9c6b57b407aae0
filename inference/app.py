r"""A page to look at slides and their reports, served to this machine.

  python inference/app.py --model runs/stage2/final_model --slides slides/

Then open the address that is printed. Pick a slide or drop one on the page, write its report, click on a line to see
which tiles it rests on, ask questions, download report, GeoJSON and pictures. Reports are written one after another.
"""

import socket
import sys

from jsonargparse.typing import PositiveInt

from command_line import DONE, counted, make_parser, run
from inference.arguments import add_decoding_arguments, check_decoding_arguments

LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def parse_arguments():
    parser = make_parser(__doc__)
    group = parser.add_argument_group("Model and slides")
    group.add_argument("--model", required=True, help="final_model folder of stage 1 or 2, trained on slides")
    group.add_argument("--slides", required=True, help="folder of slides; only what lies in it is shown")
    group.add_argument("--max_upload", default="4GB", help="largest slide that can be added on the page")
    group.add_argument("--assume_mpp", type=float, default=None, help="um/px of slides that state none or a wrong one")
    group.add_argument(
        "--segmenter", default=None, help="network that found the tissue of the model's slides, where one did; its file"
    )
    group.add_argument("--segmenter_preset", choices=("grandqc-tissue", "hest"), default=None, help="as for tile.py")
    group.add_argument("--tile_batch_size", type=PositiveInt, default=64, help="tiles per forward pass of the encoder")
    group.add_argument("--num_workers", type=PositiveInt, default=4, help="threads that read tiles")
    group = parser.add_argument_group("Address")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; at any other, the slides are open to whoever reaches it",
    )
    group.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    group.add_argument(
        "--allowed_hosts", nargs="+", default=[], help="further names that browsers may use for this machine"
    )
    add_decoding_arguments(parser)
    args = parser.parse_args()
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port {args.port}: expected 0 to 65535")
    return args


def main() -> int:
    args = parse_arguments()

    from inference.loading import model_folder
    from inference.slide_folder import SlideFolder, parse_size
    from vlm_settings import VLMSettings

    # Slides
    folder = SlideFolder(args.slides, parse_size(args.max_upload))
    if args.assume_mpp is not None:
        from stage0_tiling.slide_list import check_mpp

        try:
            check_mpp(args.assume_mpp)
        except ValueError as error:
            raise ValueError(f"--assume_mpp {args.assume_mpp}: {error}") from error

    # Address
    listening = listen(args.host, args.port)

    # Model
    args.model = model_folder(args.model)
    writer = open_writer(args, VLMSettings.read(args.model))

    # Page
    import uvicorn

    from inference.app_routes import create_app

    settings = writer.model.settings
    about = {"model": str(args.model), "llm": settings.llm_name, "encoder": settings.encoder}
    about |= {"question": settings.question, "tile_size": settings.tiling["tile_size"], "mpp": settings.tiling["mpp"]}
    about["no_evidence"] = writer.no_evidence
    hosts = LOOPBACK | {args.host.lower(), *(name.lower() for name in args.allowed_hosts)}
    app = create_app(folder, writer, about, hosts, args.assume_mpp)
    host, port = listening.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    print(f"{counted(len(folder.list()), 'slide')} in {folder.root}; Ctrl+C ends", file=sys.stderr)
    if args.host not in LOOPBACK:
        print(f"warning: whoever reaches {args.host} sees the slides; there is no password", file=sys.stderr)
    config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=3)
    uvicorn.Server(config).run(sockets=[listening])
    return DONE


def listen(host: str, port: int) -> socket.socket:
    """Listen at an address.

    Raises:
        ValueError: it is taken or not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror}; give another, or --port 0") from error


def open_writer(args, settings):
    """Model and encoder, loaded."""
    from inference.answers import Answering
    from inference.loading import open_model
    from inference.report_writer import ReportWriter, check_settings
    from inference.slide_tokens import load_encoders
    from stage0_tiling.tissue_sources import TissueSources, segmenter_file

    check_settings(settings, args.model)
    check_decoding_arguments(args)
    if (args.vision_model_name or settings.encoder) is None:
        raise ValueError(f"{args.model} does not say how its tiles were encoded; say it with --vision_model_name")
    segmenter, preset = segmenter_file(args)
    sources = TissueSources(segmenter=segmenter, preset=preset)
    sources.check_segmenter(settings.tiling.get("segmenter"))
    model, tokenizer = open_model(args)
    encoder, finish = load_encoders(settings, model.device, args.vision_model_name)
    return ReportWriter(
        model,
        tokenizer,
        encoder,
        finish=finish,
        answering=Answering.of(args, settings, tokenizer),
        sources=sources,
        assume_mpp=args.assume_mpp,
        batch_size=args.tile_batch_size,
        num_workers=args.num_workers,
    )


if __name__ == "__main__":
    run(main, to_go_on="start it again")
