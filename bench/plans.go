package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// way is a variant: where its client is, and how it gets to the server.
type way struct {
	name  string
	place string
	args  []string
}

// ways out of a laptop, the node's own first.
func (w *world) ways() []way {
	return []way{
		{"direct", "", []string{"-addr", w.pod}},
		{"raw stream", viaNothing, []string{"-raw", w.rawFile()}},
		{"kubectl port-forward", viaNothing, []string{"-addr", "127.0.0.1"}},
		{doppelProxy, viaProxy, []string{"-addr", w.pod}},
		{"doppel, port-forward", viaForward, []string{"-addr", w.pod}},
		{doppelDirect, viaDirect, []string{"-addr", w.pod}},
	}
}

// insides are the variants inwards: what is between a client in the cluster and who answers.
func (w *world) insides() []way {
	to := func(name string) []string { return []string{"-addr", w.cluster[name]} }
	return []way{
		{"no agent", "", to("server")},
		{"bare proxy", "", to("splice")},
		{"agent, no intercept", "", to("agent")},
		{"agent, passed through", "", to("matched")},
		{"agent, matched: laptop", "", append(to("matched"), "-header", "X-Bench: laptop")},
		{"agent, all: laptop", "", to("taken")},
	}
}

func group(work string, ways []way, args ...string) []cell {
	var out []cell
	for _, v := range ways {
		out = append(out, cell{work: work, variant: v.name, place: v.place, args: append(append([]string{}, v.args...), args...)})
	}
	return out
}

func bulk(ways []way, length string, conns ...string) [][]cell {
	var out [][]cell
	for _, work := range []string{"up", "down"} {
		for _, n := range conns {
			out = append(out, group("TCP "+work+", "+n, ways, "-work", work, "-conns", n, "-for", length))
		}
	}
	return out
}

// lan is all that is measured where the way is short.
func lan(w *world) [][]cell {
	out, in := w.ways(), w.insides()
	withTLS := append(out[:len(out):len(out)], way{"direct, TLS", "", []string{"-addr", w.pod, "-tls"}})
	groups := [][]cell{{{work: "memory", variant: doppelProxy, measure: idleMemory}}}
	groups = append(groups, bulk(withTLS, "1s", "1", "4", "64")...)
	for _, n := range []string{"1", "8", "64"} {
		groups = append(groups, group("HTTP, "+n, out, "-work", "http", "-conns", n))
	}
	for _, n := range []string{"1", "8"} {
		groups = append(groups, group("new connections, "+n, out, "-work", "open", "-conns", n))
	}
	groups = append(groups,
		group("echo, idle", out, "-work", "ping"),
		group("HTTP under a download", out, "-work", "loaded-down"),
		group("HTTP under an upload", out, "-work", "loaded-up"))
	var datagrams []way
	for _, v := range out {
		if v.name != "raw stream" && v.name != "kubectl port-forward" { // they carry no datagrams
			datagrams = append(datagrams, v)
		}
	}
	groups = append(groups,
		group("UDP, 64 on the way", datagrams, "-work", "udp"),
		group("UDP, 2000/s", datagrams, "-work", "udp-loss"),
		names("DNS, cluster, again", "server.bench.svc.cluster.local.", viaProxy),
		names("DNS, cluster, new", "*.bench.svc.cluster.local.", viaProxy),
		names("DNS, outside", "outside.test.", viaProxy, viaNothing),
		names("DNS, outside, new", "*.outside.test.", viaProxy, viaNothing))
	for _, n := range []string{"1", "8"} { // for longer: a goal is a few percent between two of them
		groups = append(groups, group("inwards: HTTP, "+n, in, "-work", "http", "-conns", n, "-for", "1200ms"))
	}
	var streams []way // what speaks no HTTP can only be taken whole
	for _, v := range in {
		if v.name == "no agent" || v.name == "agent, no intercept" || v.name == "agent, all: laptop" {
			streams = append(streams, v)
		}
	}
	groups = append(groups, group("inwards: download", in, "-work", "get"),
		podLine("replace", "tbf", "rate", "5gbit", "burst", "1mb", "latency", "20ms"), group(lineDownload, in[:4], "-work", "get"), podLine("del"))
	groups = append(groups, group("inwards: TCP up, 1", streams, "-work", "up"), group("inwards: new connections, 1", streams, "-work", "open"))
	return append(groups,
		[]cell{{work: "connect, cold", variant: doppelProxy, measure: coldConnect}, {work: "connect, warm", variant: doppelProxy, measure: warmConnect}},
		[]cell{{work: "intercept, agent there", variant: doppelProxy, measure: interceptThere}},
		[]cell{{work: "intercept, no agent", variant: doppelProxy, measure: interceptAbsent}})
}

// lineDownload is from pods whose line carries what the networks of clouds give one flow.
const lineDownload = "inwards: download, 5 Gbit/s"

// podLine does something to the queueing discipline of all pods' interfaces (tc(8)).
func podLine(verb string, args ...string) []cell {
	script := "for ns in $(ip netns list | cut -d' ' -f1); do tc -n $ns qdisc " + verb + " dev eth0 root " + strings.Join(args, " ") + "; done"
	return []cell{{work: lineDownload, variant: "line", measure: func(ctx context.Context, w *world) (values, error) { return nil, w.do(ctx, "", "sh", "-ec", script) }}}
}

// names is a lookup on laptops with doppel and without.
func names(work, name string, places ...string) []cell {
	var out []cell
	for _, p := range places {
		variant := doppelProxy
		if p == viaNothing {
			variant = "direct"
		}
		out = append(out, cell{work: work, variant: variant, place: p, args: []string{"-work", "dns", "-name", name}})
	}
	return out
}

// flows are opened to see what an idle one costs.
const flows = 1000

// silence is how long nothing has been done when memory is looked at: what work has taken is given back meanwhile.
const silence = 12 * time.Second

// idleMemory is what the processes have in memory, and what an idle flow adds at each end.
func idleMemory(ctx context.Context, w *world) (values, error) {
	v := values{}
	if err := sleep(ctx, silence); err != nil {
		return nil, err
	}
	before, err := w.memories(ctx)
	if err != nil {
		return nil, err
	}
	for k, b := range before {
		v[k+" MB"] = b / 1e6
	}
	took, err := w.held(ctx, viaProxy, w.pod, flows, func() error {
		if err := sleep(ctx, silence); err != nil {
			return err
		}
		after, err := w.memories(ctx)
		if err != nil {
			return err
		}
		for _, k := range []string{"user daemon", "manager"} {
			v[k+" KiB/flow"] = (after[k] - before[k]) / flows / 1024
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	v["1000 flows s"] = took["1000 s"]
	return v, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// memories are what the processes that memoryOf names have in memory now: of the laptop viaProxy, and of agents the largest.
func (w *world) memories(context.Context) (map[string]float64, error) {
	ps, err := processes(w.lab)
	if err != nil {
		return nil, err
	}
	out := map[string]float64{}
	for _, p := range ps {
		if k := memoryOf[p.kind]; k != "" && (strings.HasPrefix(p.place, "node") || p.place == viaProxy) {
			out[k] = max(out[k], p.rss)
		}
	}
	return out, nil
}

// held opens n flows on a laptop and calls fn while they are there.
func (w *world) held(ctx context.Context, place, addr string, n int, fn func() error) (values, error) {
	cmd := w.on(ctx, place, w.bin("bench"), "client", "-work", "hold", "-addr", addr, "-conns", fmt.Sprint(n))
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	dec := json.NewDecoder(out)
	took, alive := values{}, values{}
	err = dec.Decode(&took)
	if err == nil {
		err = fn()
	}
	_ = in.Close()
	if err == nil {
		err = dec.Decode(&alive)
	}
	_, _ = io.Copy(io.Discard, out)
	if werr := cmd.Wait(); werr != nil {
		return nil, errors.Join(err, fmt.Errorf("%w: %s", werr, said.String()))
	}
	return took, err
}

// timed is how long a command on a laptop takes.
func (w *world) timed(ctx context.Context, place string, args ...string) (values, error) {
	out, err := output(w.on(ctx, place, append([]string{w.bin("bench"), "timed"}, args...)...))
	if err != nil {
		return nil, err
	}
	v := values{}
	return v, json.Unmarshal(bytes.TrimSpace(out), &v)
}

func (w *world) secondsOf(ctx context.Context, place string, args ...string) (values, error) {
	v, err := w.timed(ctx, place, args...)
	return values{"s": v["s"]}, err
}

// timed is the other side: in the place itself, so that the way there does not count.
func timed(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("no command")
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	began := time.Now()
	if _, err := output(cmd); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(values{"began ms": float64(began.UnixMicro()) / 1000, "s": time.Since(began).Seconds()})
}

// coldConnect is a connect that starts the daemons.
func coldConnect(ctx context.Context, w *world) (values, error) {
	doppel := w.bin("doppel")
	_ = w.do(ctx, connects, doppel, "quit", "-s") // the first time there is nothing to end
	return w.secondsOf(ctx, connects, doppel, "connect")
}

// warmConnect is a connect with the daemons there.
func warmConnect(ctx context.Context, w *world) (values, error) {
	doppel := w.bin("doppel")
	if err := w.do(ctx, connects, doppel, "connect"); err != nil {
		return nil, err
	}
	if err := w.do(ctx, connects, doppel, "quit"); err != nil {
		return nil, err
	}
	return w.secondsOf(ctx, connects, doppel, "connect")
}

func interceptThere(ctx context.Context, w *world) (values, error) { return w.intercept(ctx, "agent") }

// interceptAbsent takes the agent away again.
func interceptAbsent(ctx context.Context, w *world) (values, error) {
	v, err := w.intercept(ctx, "fresh")
	if err == nil {
		err = w.do(ctx, viaProxy, w.bin("doppel"), "uninstall", "--agent", "fresh", "-n", "bench")
	}
	if err == nil {
		_, err = w.kubectl(ctx, "", "-n", "bench", "rollout", "status", "deployment", "fresh", "--timeout=60s")
	}
	return v, err
}

// intercept is how long it takes from typing the command until a client in the cluster gets the laptop's answer.
func (w *world) intercept(ctx context.Context, name string) (values, error) {
	seen := make(chan error, 1)
	v := values{}
	go func() {
		out, err := output(w.on(ctx, "", w.bin("bench"), "client", "-work", "until", "-addr", w.cluster[name], "-name", "laptop", "-for", "50s"))
		if err == nil {
			err = json.Unmarshal(bytes.TrimSpace(out), &v)
		}
		seen <- err
	}()
	took, err := w.timed(ctx, viaProxy, w.bin("doppel"), "intercept", name, "-n", "bench", "-p", "7003:7003", "--mount=false", "--address", "127.0.0.4")
	if err == nil {
		err = <-seen
	}
	if err != nil {
		return nil, err
	}
	if err := w.do(ctx, viaProxy, w.bin("doppel"), "leave", name); err != nil {
		return nil, err
	}
	return values{"ACTIVE s": took["s"], "first answer s": (v["at ms"] - took["began ms"]) / 1000}, nil
}

// lines are the lines of bench-wan: delay and loss in each direction.
var lines = []struct{ name, delay, loss string }{
	{"20 ms", "10ms", "0"}, {"20 ms, 1 %", "10ms", "1%"}, {"80 ms", "40ms", "0"}, {"80 ms, 1 %", "40ms", "1%"},
}

// wan is the main part through a long or bad line. "direct" is TCP to the node through the same line.
func wan(w *world) [][]cell {
	var out [][]cell
	for _, l := range lines {
		ways := []way{
			{"direct", viaNothing, []string{"-addr", w.node, "-add", fmt.Sprint(addNode)}},
			{"raw stream", viaNothing, []string{"-raw", w.rawFile()}},
			{"kubectl port-forward", viaNothing, []string{"-addr", "127.0.0.1"}},
			{doppelProxy, viaProxy, []string{"-addr", w.pod}},
			{doppelDirect, viaDirect, []string{"-addr", w.pod}},
		}
		groups := bulk(ways, "2s", "1", "4")
		groups = append(groups,
			group("HTTP, 1", ways, "-work", "http", "-for", "2s"),
			group("HTTP, 64", ways, "-work", "http", "-conns", "64", "-for", "2s"),
			group("new connections, 1", ways, "-work", "open", "-for", "2s"),
			group("HTTP under a download", ways, "-work", "loaded-down", "-for", "2s"))
		for _, g := range groups {
			for i := range g {
				g[i].line = l.name
			}
		}
		set := func(delay, loss string) []cell {
			return []cell{{work: "line", line: l.name, measure: func(ctx context.Context, w *world) (values, error) {
				for _, p := range []string{viaNothing, viaProxy, viaDirect} {
					if err := w.runLab(ctx, "laptop", "link", p, "--delay", delay, "--loss", loss); err != nil {
						return nil, err
					}
				}
				return nil, nil
			}}}
		}
		out = append(out, set(l.delay, l.loss))
		out = append(out, groups...)
		out = append(out, set("0", "0"))
	}
	return out
}

// scale is a large cluster: 5,000 namespaces with two services each, and 10,000 connections of one laptop.
func scale(w *world) [][]cell {
	return [][]cell{
		{{work: "cluster", measure: enlarge, limit: 20 * time.Minute}},
		{{work: "connect, cold", variant: doppelProxy, measure: coldConnect}},
		{{work: "connect, warm", variant: doppelProxy, measure: warmConnect}},
		{{work: "10000 connections", variant: doppelProxy, measure: manyFlows}},
	}
}

// enlarge makes the namespaces and services, once. The services select nothing: for each that does, the controller manager writes an endpoint slice without
// endpoints.
func enlarge(ctx context.Context, w *world) (values, error) {
	const namespaces, services = 5000, 2
	if _, err := w.kubectl(ctx, "", "get", "namespace", fmt.Sprintf("team-%d", namespaces-1)); err == nil {
		return nil, nil
	}
	began := time.Now()
	create, err := w.creator()
	if err != nil {
		return nil, err
	}
	failed := make(chan error, namespaces)
	slots := make(chan struct{}, creators)
	var wg sync.WaitGroup
	for n := range namespaces {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			err := create(ctx, "/api/v1/namespaces", fmt.Sprintf(`{"metadata":{"name":"team-%d"}}`, n))
			for s := 0; s < services && err == nil; s++ {
				err = create(ctx, fmt.Sprintf("/api/v1/namespaces/team-%d/services", n), fmt.Sprintf(`{"metadata":{"name":"web-%d"},"spec":{"ports":[{"port":80}]}}`, s))
			}
			if err != nil {
				failed <- err
			}
		})
	}
	wg.Wait()
	select {
	case err := <-failed:
		return nil, err
	default:
		return values{"s": time.Since(began).Seconds()}, nil
	}
}

// creators are at work at once.
const creators = 32

// creator returns what creates an object at a path, if it is not there: faster than kubectl, for which thousands are many.
func (w *world) creator() (func(ctx context.Context, path, object string) error, error) {
	way, cfg, err := readRaw(w.rawFile())
	if err != nil {
		return nil, err
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: cfg, MaxIdleConnsPerHost: creators}}
	return func(ctx context.Context, path, object string) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+way.Server+path, strings.NewReader(object))
		if err != nil {
			return err
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusCreated && resp.StatusCode != http.StatusConflict {
			err = fmt.Errorf("create %s: %s: %s", path, resp.Status, text)
		}
		return err
	}, nil
}

func manyFlows(ctx context.Context, w *world) (values, error) {
	v := values{}
	took, err := w.held(ctx, viaProxy, w.pod, 10_000, func() error {
		m, err := w.memories(ctx)
		for k, b := range m {
			v[k+" MB"] = b / 1e6
		}
		return err
	})
	for k, x := range took {
		v[k] = x
	}
	return v, err
}
