"""Read what the service knows while a request is served: weights now, segments, next categories.

    with Lookup("redis://localhost:6379/0") as lookup:
        lookup.weights("u1")            # decayed to now
        lookup.is_member("u1", "buy-swimwear")
        lookup.next_categories("u1")

In the order in which a question meets them: `client` (`Lookup` and `AsyncLookup`, which ask Redis and nothing
else), `questions` (which commands a question takes and what their replies say, without I/O), `answers` (what
comes back). Never writes, and imports neither Faust nor a Kafka client nor
the model's libraries, so that an app may depend on it.

What every answer has in common
-------------------------------
An unknown user is ``None``, not an exception and not an empty answer: nothing of the user was ever folded, or
the history has faded away and no base segment is left. A user who is known and in no segment, or was never
scored because the model is off, has an answer that is empty. `is_member` says ``False`` for who is unknown.

"Now" is the wall clock of the caller's machine; where the service runs by the event clock it is the stream
time of the user's partition, since the wall clock means nothing to a replay. Instants are Unix milliseconds.

Each question about a user is one round trip where Kafka's default partitioner puts the user. Who is not there
is looked for in all other partitions, in one more, since another producer may partition differently.
``sa:meta`` is read once; every reply also says which settings its partition was folded under, so a client
that outlives a `stream-app rebuild` with other settings notices, reads it again and asks again.
"""

from stream_app.core.scores import Recommendation, Scored
from stream_app.lookup.answers import (
    Accuracy,
    Membership,
    Meta,
    NextCategories,
    NextCategory,
    Prediction,
    Recommendations,
    UserView,
    UserWeights,
)
from stream_app.lookup.client import AsyncLookup, Lookup

__all__ = [
    "Accuracy",
    "AsyncLookup",
    "Lookup",
    "Membership",
    "Meta",
    "NextCategories",
    "NextCategory",
    "Prediction",
    "Recommendation",
    "Recommendations",
    "Scored",
    "UserView",
    "UserWeights",
]
