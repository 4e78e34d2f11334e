package streamapp.bench;

import com.fasterxml.jackson.annotation.JsonIgnoreProperties;
import com.fasterxml.jackson.annotation.JsonProperty;
import java.util.List;

/** One event of the input topic; the fields that are not used here are skipped. */
@JsonIgnoreProperties(ignoreUnknown = true)
public record Event(
        @JsonProperty("user_id") String userId,
        @JsonProperty("event_type") String eventType,
        @JsonProperty("labels") List<String> labels,
        @JsonProperty("timestamp") double timestamp) {}
