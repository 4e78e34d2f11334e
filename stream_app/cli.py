"""The command line: the group of verbs, and the one place where a failure becomes an exit code.

Exit codes are a contract: 0 done, 1 failed, 2 wrong use or configuration. Every expected failure is one
sentence on stderr (a configuration with several problems: one line each), never a traceback; a traceback is
a defect of this program. What a verb does is in `stream_app.commands`, one file each.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from stream_app.commands.demo import demo
from stream_app.commands.doctor import doctor
from stream_app.commands.evaluate import evaluate
from stream_app.commands.options import closing
from stream_app.commands.rebuild import rebuild
from stream_app.commands.replay import replay
from stream_app.commands.segments import segments
from stream_app.commands.services import services
from stream_app.commands.show import show
from stream_app.commands.topics import topics
from stream_app.commands.worker import worker
from stream_app.errors import ConfigError, StreamAppError

DONE, FAILED, WRONG_USE = 0, 1, 2


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=closing(
        "stream-app demo                      see it work, with nothing installed beside it",
        "stream-app topics                    on your own Kafka and Redis (config/app.toml): once",
        "stream-app worker                    then as many of these as you like",
        "stream-app replay events.jsonl.gz    events from files",
    ),
)
def cli() -> None:
    """Real-time growth segments: who turned to what, and the moment they turn away.

    User events arrive on a Kafka topic; every user's interests are kept in Redis as weights that fade with
    time; the moment a user enters or leaves a segment, an event is published.

    Results go to stdout, everything else to stderr.
    """


for _verb in (demo, services, topics, worker, replay, show, segments, evaluate, doctor, rebuild):
    cli.add_command(_verb)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments
        Without the program's name; None: those of the process.

    Returns
    -------
    int
        The exit code.
    """
    try:
        code = cli.main(
            None if arguments is None else list(arguments), prog_name="stream-app", standalone_mode=False
        )
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return WRONG_USE
    except click.ClickException as error:
        _complain(error)
        return WRONG_USE
    except ConfigError as error:
        click.echo(str(error), err=True)
        return WRONG_USE
    except StreamAppError as error:
        click.echo(str(error), err=True)
        return FAILED
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return FAILED
    except BrokenPipeError:
        # The reader of our output (`| head`) has left; what is still buffered for it must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return code if isinstance(code, int) else DONE


def _complain(error: click.ClickException) -> None:
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = context.command_path if context is not None else "stream-app"
    click.echo(f"{path}: {error.format_message().rstrip('.')}. See `{path} --help`.", err=True)
