// What stream-app knows of a user, from Go:
//
//	REDIS_URL=redis://localhost:6379 go run . USER [NOW_MS]
//
// prints {"partition", "weights", "segments", "next"} as JSON; the last three are null for an unknown user.
package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/redis/go-redis/v9"
)

// partitionOf is Kafka's default partitioner: murmur2 of the key's UTF-8, as in its Java client.
func partitionOf(userID string, partitions int) int {
	const m = 0x5bd1e995
	data := []byte(userID)
	h := 0x9747b28c ^ uint32(len(data))
	for ; len(data) >= 4; data = data[4:] {
		k := binary.LittleEndian.Uint32(data) * m
		k ^= k >> 24
		h = h*m ^ k*m
	}
	if len(data) > 0 {
		for i, b := range data {
			h ^= uint32(b) << (8 * i)
		}
		h *= m
	}
	h ^= h >> 13
	h *= m
	h ^= h >> 15
	return int(h&0x7fffffff) % partitions
}

type typeWeights struct {
	Total  float64            `json:"total"`
	Labels map[string]float64 `json:"labels"`
	Assets map[string]float64 `json:"assets"`
}

type weights struct {
	Now   int64                  `json:"now"`
	Types map[string]typeWeights `json:"types"`
}

type segment struct {
	ID      string   `json:"segment_id"`
	Type    string   `json:"type"`
	ExitsAt any      `json:"exits_at"` // Unix ms, nil for never by decay
	Labels  []any    `json:"labels,omitempty"`
	Score   *float64 `json:"score,omitempty"`
}

type segments struct {
	Now      int64     `json:"now"`
	Segments []segment `json:"segments"`
}

type category struct {
	Label string  `json:"label"`
	Score float64 `json:"score"`
}

type recommendation struct {
	EventType    string  `json:"event_type"`
	AssetID      any     `json:"asset_id"`
	Labels       []any   `json:"labels"`
	GrowthWeight float64 `json:"growth_weight"`
	BaseWeight   float64 `json:"base_weight"`
}

type next struct {
	ScoredAt        any              `json:"scored_at"` // nil for a user who was never scored
	ModelVersion    any              `json:"model_version"`
	Categories      []category       `json:"categories"`
	Recommendations []recommendation `json:"recommendations"`
}

// number reads a string that holds a double exactly.
func number(text any) float64 {
	found, err := strconv.ParseFloat(text.(string), 64)
	if err != nil {
		panic(err)
	}
	return found
}

// byName reads [name, number, name, number, ...].
func byName(flat any) map[string]float64 {
	row := flat.([]any)
	found := make(map[string]float64, len(row)/2)
	for i := 0; i < len(row); i += 2 {
		found[row[i].(string)] = number(row[i+1])
	}
	return found
}

func readWeights(reply []any) *weights {
	found := &weights{reply[0].(int64), map[string]typeWeights{}}
	for _, item := range reply[1].([]any) {
		row := item.([]any)
		found.Types[row[0].(string)] = typeWeights{number(row[1]), byName(row[2]), byName(row[3])}
	}
	return found
}

func readSegments(reply []any) *segments {
	found := &segments{reply[0].(int64), []segment{}}
	for _, item := range reply[1].([]any) {
		row := item.([]any)
		read := segment{ID: row[0].(string), Type: row[1].(string), ExitsAt: row[2]}
		if read.Type == "discovery" {
			score := number(row[4])
			read.Labels, read.Score = row[3].([]any), &score
		}
		found.Segments = append(found.Segments, read)
	}
	return found
}

func readNext(reply []any) *next {
	found := &next{reply[0], reply[1], []category{}, []recommendation{}}
	for flat := reply[2].([]any); len(flat) > 0; flat = flat[2:] {
		found.Categories = append(found.Categories, category{flat[0].(string), number(flat[1])})
	}
	for _, item := range reply[3].([]any) {
		row := item.([]any)
		found.Recommendations = append(found.Recommendations,
			recommendation{row[0].(string), row[1], row[2].([]any), number(row[3]), number(row[4])})
	}
	return found
}

func lookup(ctx context.Context, client *redis.Client, userID, now string) (map[string]any, error) {
	// Once for the life of an app: how the state is laid out, and whether the functions fit it.
	meta, err := client.HGetAll(ctx, "sa:meta").Result()
	if err != nil {
		return nil, err
	}
	version, err := client.FCallRO(ctx, "sa_version", nil).Text()
	if err != nil {
		return nil, err
	}
	if version != meta["functions"] {
		return nil, fmt.Errorf("expected the function library %s of sa:meta, got %s", meta["functions"], version)
	}
	partitions, err := strconv.Atoi(meta["partitions"])
	if err != nil {
		return nil, err
	}

	partition := partitionOf(userID, partitions)
	profile := fmt.Sprintf("sa:{%d}:profile:%s", partition, userID)
	scores := fmt.Sprintf("sa:{%d}:next:%s", partition, userID)
	// "" is the server's time; with the event clock "now" is what the replay has reached.
	if now == "" && meta["clock"] == "event" {
		if now, err = client.HGet(ctx, fmt.Sprintf("sa:{%d}:wm", partition), "stream_time_ms").Result(); err != nil {
			return nil, err
		}
	}

	// Sent together: one round trip. The error that Exec returns is one of those looked at below.
	pipeline := client.Pipeline()
	w := pipeline.FCallRO(ctx, "sa_weights", []string{profile}, now)
	s := pipeline.FCallRO(ctx, "sa_segments", []string{profile}, now)
	n := pipeline.FCallRO(ctx, "sa_next", []string{profile, scores}, now)
	_, _ = pipeline.Exec(ctx)

	answer := map[string]any{"partition": partition, "weights": nil, "segments": nil, "next": nil}
	for name, reply := range map[string]*redis.Cmd{"weights": w, "segments": s, "next": n} {
		row, err := reply.Slice()
		switch {
		case errors.Is(err, redis.Nil):
			continue // an unknown user
		case err != nil:
			return nil, err
		case name == "weights":
			answer[name] = readWeights(row)
		case name == "segments":
			answer[name] = readSegments(row)
		default:
			answer[name] = readNext(row)
		}
	}
	return answer, nil
}

func run() error {
	options, err := redis.ParseURL(os.Getenv("REDIS_URL"))
	if err != nil {
		return err
	}
	client := redis.NewClient(options)
	defer client.Close()
	now := ""
	if len(os.Args) > 2 {
		now = os.Args[2]
	}
	answer, err := lookup(context.Background(), client, os.Args[1], now)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(answer)
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
