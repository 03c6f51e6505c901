package e2e

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// tally counts requests of a kind.
type tally struct {
	Sent       int     `json:"sent"`
	Amid       int     `json:"amid"`        // in flight when the fault happened
	AmidFailed int     `json:"amid_failed"` // of these
	Failed     int     `json:"failed"`      // of the others
	Wrong      int     `json:"wrong"`       // answered by whom they were not for
	Gap        float64 `json:"gap"`         // seconds without an answer, the longest
}

func (t *tally) add(o tally) {
	t.Sent, t.Amid, t.AmidFailed, t.Failed, t.Wrong, t.Gap = t.Sent+o.Sent, t.Amid+o.Amid, t.AmidFailed+o.AmidFailed, t.Failed+o.Failed, t.Wrong+o.Wrong, max(t.Gap, o.Gap)
}

// outcome is what came of a fault once. Times are seconds since the fault was over.
type outcome struct {
	Began    time.Time        `json:"began"`
	Commit   string           `json:"commit"`
	Rate     int              `json:"rate"`
	Kinds    map[string]tally `json:"kinds"`   // traffic by kind
	Normal   float64          `json:"normal"`  // until all was answered by whom it should be
	Laptop   float64          `json:"laptop"`  // until the laptop was as before
	Cluster  float64          `json:"cluster"` // and the cluster
	Problems []string         `json:"problems,omitempty"`

	failures map[string][]string // by kind, some of those that were not in flight; for the log
}

func (o *outcome) problem(what string, err error) {
	if err != nil {
		o.Problems = append(o.Problems, what+": "+err.Error())
	}
}

// count sorts the answers from the fault on; what overlaps the time from began to amid was in flight.
func (o *outcome) count(all []answer, began, amid, normal time.Time) {
	o.Kinds = map[string]tally{}
	last := map[string]time.Time{} // good answer
	slices.SortFunc(all, func(a, b answer) int { return a.end().Compare(b.end()) })
	for _, a := range all {
		k := a.kind()
		t := o.Kinds[k]
		if a.end().After(began) {
			t.Sent++
			inFlight := a.Taken && !a.Start.After(amid)
			if inFlight {
				t.Amid++
			}
			switch {
			case a.Err != "" && inFlight:
				t.AmidFailed++
			case a.Err != "":
				t.Failed++
				o.example(a, began)
			case !a.good(taker) && !a.good("app"):
				t.Wrong++
				o.example(a, began)
			}
			if l, ok := last[k]; ok && a.Err == "" && l.Before(normal.Add(quiet)) {
				t.Gap = max(t.Gap, a.end().Sub(l).Seconds())
			}
		}
		if a.Err == "" {
			last[k] = a.end()
		}
		o.Kinds[k] = t
	}
}

// example keeps the first few failures of each kind.
func (o *outcome) example(a answer, began time.Time) {
	if o.failures == nil {
		o.failures = map[string][]string{}
	}
	if k := a.kind(); len(o.failures[k]) < 4 {
		o.failures[k] = append(o.failures[k], fmt.Sprintf("at %v for %v %q %s", a.Start.Sub(began).Round(time.Millisecond), a.Took.Round(time.Millisecond), a.Body, a.Err))
	}
}

func (a answer) end() time.Time { return a.Start.Add(a.Took) }

const takenSuffix = ", taken"

func (a answer) kind() string {
	if a.Taken {
		return a.Kind + takenSuffix
	}
	return a.Kind
}

// sum adds up the kinds that are taken, or the others.
func (o outcome) sum(taken bool) (t tally) {
	for k, v := range o.Kinds {
		if strings.HasSuffix(k, takenSuffix) == taken && k != plain {
			t.add(v)
		}
	}
	return t
}

// broken says which promises were: nothing fails for callers whose requests are not taken, for the others only what was in flight; and each is answered
// by whom it is for.
func (o outcome) broken(f fault) []string {
	var out []string
	if t := o.sum(false); (t.Failed > 0 && !f.ends) || t.Wrong > 0 {
		out = append(out, fmt.Sprintf("callers whose requests are not taken: %+v", t))
	}
	if t := o.sum(true); (t.Failed > 0 && !f.ends) || t.Wrong > 0 {
		out = append(out, fmt.Sprintf("callers whose requests are taken: %+v", t))
	}
	if t := o.sum(true); f.unseen && (t.AmidFailed > 0 || o.Normal > 0) {
		out = append(out, fmt.Sprintf("somebody noticed it: %+v, normal after %.2f s", t, o.Normal))
	}
	if f.ends && o.Normal > endsBack.Seconds() {
		out = append(out, fmt.Sprintf("normal after %.2f s", o.Normal))
	}
	if len(out) > 0 {
		for k, v := range o.Kinds {
			if v.AmidFailed+v.Failed+v.Wrong > 0 {
				out = append(out, fmt.Sprintf("%s: %+v\n\t%s", k, v, strings.Join(o.failures[k], "\n\t")))
			}
		}
	}
	return out
}

// disturbed says that callers who have nothing to do with doppel had to wait too: the machine was busy, and nothing can be said about anybody.
func (o outcome) disturbed() bool {
	t := o.Kinds[plain]
	return t.Failed > 0 || t.Gap > 1
}

func (o outcome) String() string {
	longest := slices.MaxFunc(append(slices.Collect(maps.Keys(o.Kinds)), plain), func(a, b string) int { return cmp.Compare(o.Kinds[a].Gap, o.Kinds[b].Gap) })
	return fmt.Sprintf("normal after %.2f s, laptop %.2f s, cluster %.2f s; others %+v; taken %+v; %s %+v; the longest gap is that of %s", o.Normal, o.Laptop, o.Cluster, o.sum(false), o.sum(true), plain, o.Kinds[plain], longest)
}

// results is the file of a fault.
type results struct {
	Fault  string    `json:"fault"`
	Goal   int       `json:"goal"` // rounds
	Rounds []outcome `json:"rounds"`

	Disturbed int `json:"disturbed"` // rounds that do not count

	begun int // rounds that are not among Rounds yet
}

func (r *results) fault() fault {
	return faults[slices.IndexFunc(faults, func(f fault) bool { return f.name == r.Fault })]
}

func (r *results) share() float64 {
	if r.Goal == 0 {
		return 1
	}
	return float64(len(r.Rounds)+r.begun) / float64(r.Goal)
}

func resultsFile(dir, fault string) string {
	return filepath.Join(dir, strings.Trim(regexp.MustCompile(`[^a-z0-9]+`).ReplaceAllString(strings.ToLower(fault), "-"), "-")+".json")
}

func readResults(dir, fault string) (*results, error) {
	r := &results{Fault: fault}
	b, err := os.ReadFile(resultsFile(dir, fault))
	if errors.Is(err, os.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return nil, err
	}
	return r, json.Unmarshal(b, r)
}

// write adds no line for a kind's every figure: a file has a line for each round.
func (r *results) write(dir string) error {
	var b strings.Builder
	fmt.Fprintf(&b, "{\"fault\": %q, \"goal\": %d, \"disturbed\": %d, \"rounds\": [\n", r.Fault, r.Goal, r.Disturbed)
	for i, o := range r.Rounds {
		line, err := json.Marshal(o)
		if err != nil {
			return err
		}
		b.Write(line)
		b.WriteString(map[bool]string{true: "\n", false: ",\n"}[i == len(r.Rounds)-1])
	}
	b.WriteString("]}\n")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(resultsFile(dir, r.Fault), []byte(b.String()), 0o644)
}

const reliabilityIntro = `# Reliability

<!-- Written by make torture from docs/reliability/*.json; edit e2e/reliability_test.go. -->

What callers in the cluster notice when parts of doppel, of the cluster or of the laptop break. Anybody with a Linux machine and root can repeat it:
` + "`make torture`" + ` takes up to 90 minutes and goes on where an earlier run has ended; ` + "`make test`" + ` has each of the quick faults once.

## Method

On a lab ([lab/README.md](../lab/README.md)): a real Kubernetes and a laptop in network namespaces of one machine. A program on the node calls two workloads, two pods each, all
with agents, up to 500 times a second (below it says how often) whatever is answered: HTTP/1 (on kept and on new connections), HTTP/2, gRPC, WebSockets, TCP and UDP. An intercept takes half of them: by a
header's value, or for TCP and UDP by port. The callers of the other half are the rest of the team. No client tries again, and one that has no answer after 3 s counts it as failed.

A third workload without agents is called 20 times a second: when one of its callers fails or waits for more than a second the machine was busy, and the round does not count.

Each fault happens at a random moment. A request is *in flight* if it runs at that moment (a WebSocket while it is open), or begins before its agent can know: half a second later, and where
something hangs and does not end, a second and a half. For a bad line, which goes on, that is all the time. Requests that are not taken are never in flight: none of them may fail. A fault is over when what was broken has come back by
itself or was brought back (a link, an address, a server of the cluster). *Normal* is when the last answer has come that was an error or from
somebody else than it should be from: the laptop, or the app if the laptop's session has ended. *Gap* is the longest time in which a kind of caller got no answer at all.
For the relay the fault is over when its preview answers again, at most 10 s later.
What is killed in the cluster is started again at once, as the first time on any cluster: the lab's kubelets do not wait longer each time.

*As before* is when laptop or cluster equal a picture that was taken before: of the laptop links, addresses, routes, rules, redirects, resolver, mounts, processes and files outside the state directory; of the
cluster doppel's objects, pods, workloads, services, config maps, names of secrets, and the redirects in all pods. After the death of a user daemon the laptop has to look as
if it had never been connected, and the cluster's time is that of its session's end; rounds of faults that
leave manager and API server alone go on meanwhile. Otherwise the cluster is looked at when the callers have been well for 3.2 s, so that no figure is smaller. Session and intercepts have to be
the same objects afterwards, but where the daemon has died, quit, or slept for longer than its session is kept.

A jump of the clock is not among these faults, since all parts of a lab have one kernel's clock: unit tests have it (TestClock and TestTokensOfAnotherClock of the manager, TestSlept of the laptop), each with a clock of its own.

`

// page writes the report.
func page(all []results, soak *soaked, scale *scaled) string {
	var b strings.Builder
	b.WriteString(reliabilityIntro)
	b.WriteString("## Callers\n\nRequests of all rounds together, from the fault until all was well; gaps are the longest of any round, in seconds.\n\n")
	b.WriteString("| fault | rounds | others: sent | failed | gap | taken: sent | in flight | of these failed | others failed | gap |\n|---|---|---|---|---|---|---|---|---|---|\n")
	kinds := map[string]*tally{}
	disturbed, rates := 0, map[int]int{}
	for _, r := range all {
		var others, taken tally
		disturbed += r.Disturbed
		for _, o := range r.Rounds {
			rates[o.Rate]++
			others.add(o.sum(false))
			taken.add(o.sum(true))
			for k, v := range o.Kinds {
				if kinds[k] == nil {
					kinds[k] = &tally{}
				}
				kinds[k].add(v)
			}
		}
		fmt.Fprintf(&b, "| %s | %d of %d | %d | %d | %.2f | %d | %d | %d | %d | %.2f |\n", r.Fault, len(r.Rounds), r.Goal,
			others.Sent, others.Failed, others.Gap, taken.Sent, taken.Amid, taken.AmidFailed, taken.Failed, taken.Gap)
	}
	fmt.Fprintf(&b, "\n%d rounds did not count.", disturbed)
	for _, rate := range slices.Sorted(maps.Keys(rates)) {
		fmt.Fprintf(&b, " %d rounds had %d requests/s.", rates[rate], rate)
	}
	b.WriteString(" With an agent die the connections through it, as those to an app do when it dies, and until it is back (a second or two) none can be made to its pod: callers of all kinds notice that, and it is all that the rows of the agent count.\n\nOf all faults together, by kind:\n\n| kind | others: sent | failed | taken: sent | in flight | of these failed | others failed |\n|---|---|---|---|---|---|---|\n")
	for _, c := range callers {
		o, t := kinds[c.name], kinds[c.name+takenSuffix]
		if o != nil && t != nil {
			fmt.Fprintf(&b, "| %s | %d | %d | %d | %d | %d | %d |\n", c.name, o.Sent, o.Failed, t.Sent, t.Amid, t.AmidFailed, t.Failed)
		}
	}
	b.WriteString("\n## Back to normal, and nothing left\n\nSeconds after the fault was over: median and longest.\n\n| fault | normal | laptop as before | cluster as before | rounds with a promise broken |\n|---|---|---|---|---|\n")
	for _, r := range all {
		times := func(of func(outcome) float64) string {
			var s []float64
			for _, o := range r.Rounds {
				s = append(s, of(o))
			}
			slices.Sort(s)
			if len(s) == 0 {
				return "–"
			}
			return fmt.Sprintf("%.2f, %.2f", s[(len(s)-1)/2], s[len(s)-1])
		}
		broken := 0
		i := slices.IndexFunc(faults, func(f fault) bool { return f.name == r.Fault })
		for _, o := range r.Rounds {
			if len(o.Problems) > 0 || i >= 0 && len(o.broken(faults[i])) > 0 {
				broken++
			}
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %d |\n", r.Fault, times(func(o outcome) float64 { return o.Normal }), times(func(o outcome) float64 { return o.Laptop }), times(func(o outcome) float64 { return o.Cluster }), broken)
	}
	b.WriteString(soakPage(soak))
	b.WriteString(scalePage(scale))
	b.WriteString(reliabilityFound)
	return b.String()
}

const reliabilityFound = `
## What it has found

- A laptop that died or hung kept, for the second in which its tunnel may come back, requests that came later on connections that it had taken: now they are the app's at once.
- A laptop that fell silent was not noticed, for up to 80 s, by clients that make no new connections: now it is pinged when it does not answer.
- Each UDP conversation of an agent held 64 KiB until it was idle for two minutes. With five new clients a second an agent had more than the 64 MiB that the runs allow it, and was
  ended for that in a row of a killed command line, whose requests of others failed. Now a conversation that waits holds no buffer.
- When the node of the leading manager was cut off, agents had the next one after 10 s, but the laptop waited for the mux's keepalive, for up to 80 s. Now it makes another connection when nothing
  comes for 4 to 5 s after something was sent, and is there as soon as there is a leader.
- When such a node was back its manager, which leads no more, ended its sessions, and agents trusted it for the moment until what was open on them had ended: requests on open HTTP/2 connections were reset. Now they trust
  the next session only.
- An agent that died a second time within seconds was in CrashLoopBackOff, and the intercept failed for good. Now it is interrupted, and goes on when the agent is back.
- doppel intercept --preview-url right after doppel connect said, in one of some twenty, that the cluster has no relay. Now it waits for the manager's first word.
- doppel quit -s came back when the daemons listened no more, and one of them still had its log open. Now it waits until they have ended.
`

// TestReliabilityPage compares docs/reliability.md with the results; make torture has it written.
func TestReliabilityPage(t *testing.T) {
	docs := filepath.Join("..", "docs")
	var all []results
	for _, f := range faults {
		if r := ok(readResults(filepath.Join(docs, "reliability"), f.name))(t); len(r.Rounds) > 0 {
			all = append(all, *r)
		}
	}
	soak := ok(readSoak(filepath.Join(docs, "reliability")))(t)
	scale := ok(readScale(filepath.Join(docs, "reliability")))(t)
	text := page(all, soak, scale)
	file := filepath.Join(docs, "reliability.md")
	if os.Getenv(envTorture) != "" {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if b := ok(os.ReadFile(file))(t); string(b) != text {
		t.Error("docs/reliability.md is not what its results give: make torture-report")
	}
}

func TestOutcomeCount(t *testing.T) {
	at := func(ms int) time.Time { return time.UnixMilli(int64(ms)) }
	a := func(start, end int, taken bool, who, err string) answer {
		return answer{Kind: "HTTP/1", Taken: taken, Start: at(start), Took: time.Duration(end-start) * time.Millisecond, Body: who, Err: err}
	}
	var o outcome
	o.count([]answer{
		a(0, 10, true, taker, ""),    // before
		a(90, 110, true, taker, ""),  // in flight, answered
		a(95, 120, true, "", "EOF"),  // in flight, lost
		a(150, 600, true, "app", ""), // after, the app stands in
		a(160, 170, true, "", "EOF"), // after, lost
		a(0, 105, false, "app", ""),
		a(170, 180, false, taker, ""), // not for the laptop
	}, at(100), at(130), at(600))
	if got, want := o.sum(true), (tally{Sent: 4, Amid: 2, AmidFailed: 1, Failed: 1, Gap: .49}); math.Abs(got.Gap-want.Gap) > .001 || got.Sent != want.Sent || got.Amid != want.Amid || got.AmidFailed != 1 || got.Failed != 1 {
		t.Errorf("taken: %+v, want %+v", got, want)
	}
	if got := o.sum(false); got.Sent != 2 || got.Wrong != 1 || got.Failed+got.AmidFailed != 0 {
		t.Errorf("others: %+v", got)
	}
	if len(o.broken(fault{})) == 0 {
		t.Error("no promise is broken")
	}
	o = outcome{}
	o.count([]answer{a(95, 120, true, "", "EOF")}, at(100), at(130), at(130))
	if len(o.broken(fault{})) != 0 || len(o.broken(fault{unseen: true})) == 0 {
		t.Error("a request in flight may fail, but not where nobody is to notice anything")
	}
}
