package streamapp.bench;

import com.fasterxml.jackson.annotation.JsonProperty;

/** One message of an output topic: a user entered or left a segment. */
public record Transition(
        @JsonProperty("user_id") String userId,
        @JsonProperty("segment_id") String segmentId,
        @JsonProperty("status") String status,
        @JsonProperty("seq") int seq,
        @JsonProperty("time") long time,
        @JsonProperty("weight") double weight) {

    public static final String ENTERED = "entered";
    public static final String EXITED = "exited";
}
