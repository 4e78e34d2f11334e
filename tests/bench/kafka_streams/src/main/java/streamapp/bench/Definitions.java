package streamapp.bench;

import com.fasterxml.jackson.annotation.JsonProperty;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.File;
import java.io.IOException;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/** The segments of a run, found by id and by label, and what an event of a type weighs. */
public final class Definitions {

    /** One segment: a user is in it from the minimal weight of one of its labels on, until below the exit weight. */
    public record Segment(
            @JsonProperty("id") String id,
            @JsonProperty("labels") List<String> labels,
            @JsonProperty("min_weight") double minWeight,
            @JsonProperty("exit_weight") double exitWeight) {}

    private record Content(
            @JsonProperty("half_life_s") double halfLifeS,
            @JsonProperty("action_weights") Map<String, Double> actionWeights,
            @JsonProperty("segments") List<Segment> segments) {}

    private final double halfLifeS;
    private final Map<String, Double> actionWeights;
    private final Map<String, Segment> byId = new HashMap<>();
    private final Map<String, List<Segment>> byLabel = new HashMap<>();

    private Definitions(Content content) {
        halfLifeS = content.halfLifeS();
        actionWeights = content.actionWeights();
        for (Segment segment : content.segments()) {
            byId.put(segment.id(), segment);
            for (String label : segment.labels()) {
                byLabel.computeIfAbsent(label, unused -> new ArrayList<>()).add(segment);
            }
        }
    }

    public static Definitions read(File file) throws IOException {
        return new Definitions(new ObjectMapper().readValue(file, Content.class));
    }

    public Segment segment(String id) {
        return byId.get(id);
    }

    public List<Segment> naming(String label) {
        return byLabel.getOrDefault(label, List.of());
    }

    public double actionWeight(String eventType) {
        return actionWeights.getOrDefault(eventType, 1.0);
    }

    /** What remains of a weight after so many seconds, as a factor. */
    public double decay(double seconds) {
        return Math.pow(2.0, -seconds / halfLifeS);
    }
}
