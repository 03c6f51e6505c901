package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// measurement is what one cell of a table gave in one round.
type measurement struct {
	Work    string             `json:"work"`    // what was done
	Variant string             `json:"variant"` // by which way
	Line    string             `json:"line,omitempty"`
	Values  values             `json:"values,omitempty"`
	CPU     map[string]float64 `json:"cpu,omitempty"` // seconds by kind of process
	Err     string             `json:"err,omitempty"`
}

// round is one pass through all cells, in an order of its own.
type round struct {
	Began        time.Time     `json:"began"`
	Commit       string        `json:"commit"`
	Load         string        `json:"load"` // of the machine when it began: proc_loadavg(5)
	Measurements []measurement `json:"measurements"`
}

// results is the file of raw figures.
type results struct {
	Plan    string            `json:"plan"`
	Machine map[string]string `json:"machine"`
	Rounds  []round           `json:"rounds"`
}

// cell is one measurement of a plan.
type cell struct {
	work, variant, line string
	place               string   // the laptop where the client is; "": the node
	args                []string // of the client
	measure             func(context.Context, *world) (values, error)
	limit               time.Duration // of the measurement; 0: deadline
}

// plan is a list of groups; the cells of a group alternate.
type plan struct {
	begin func(*world, context.Context) error // before each round
	cells func(*world) [][]cell
}

var plans = map[string]plan{"lan": {(*world).connectForward, lan}, "wan": {nil, wan}, "scale": {nil, scale}}

// deadline bounds one measurement, whatever hangs.
const deadline = time.Minute

func run(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("run", flag.ContinueOnError)
	name := f.String("plan", "lan", "lan, wan or scale")
	rounds := f.Int("rounds", 5, "how many rounds the file is to have: those that it has count")
	only := f.String("only", "", "only measurements whose work, variant and line match this")
	out := f.String("out", "", "the file of raw figures")
	lab := f.String("lab", "bench", "the lab")
	keep := f.Bool("keep", false, "leave the lab running")
	within := f.Duration("within", 20*time.Minute, "begin no round that would end later")
	if err := f.Parse(args); err != nil {
		return err
	}
	p, ok := plans[*name]
	if !ok {
		return fmt.Errorf("no such plan: %q", *name)
	}
	match, err := regexp.Compile(*only)
	if err != nil {
		return err
	}
	began := time.Now()
	res, err := readResults(*out, *name)
	if err != nil {
		return err
	}
	wd, err := os.Getwd()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "doppel-bench-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	w := &world{lab: *lab, root: wd, dir: dir}
	defer func() {
		w.stop()
		if !*keep {
			if err := w.runLab(context.WithoutCancel(ctx), "down"); err != nil {
				fmt.Fprintln(os.Stderr, "bench:", err)
			}
		}
	}()
	if err := w.setUp(ctx); err != nil {
		return err
	}
	longest := time.Duration(0)
	for len(res.Rounds) < *rounds {
		if time.Since(began)+longest > *within {
			return fmt.Errorf("%d of %d rounds in %v; run it again for the others", len(res.Rounds), *rounds, time.Since(began).Round(time.Second))
		}
		from := time.Now()
		if p.begin != nil {
			if err := p.begin(w, ctx); err != nil {
				return err
			}
		}
		r, err := w.round(ctx, p.cells(w), match)
		if err != nil {
			return err
		}
		res.Rounds = append(res.Rounds, r)
		if err := res.write(*out); err != nil {
			return err
		}
		longest = max(longest, time.Since(from))
	}
	return nil
}

// readResults reads what was measured before, so that an interrupted run goes on.
func readResults(file, plan string) (*results, error) {
	res := &results{Plan: plan, Machine: machine()}
	text, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return res, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, res); err != nil {
		return nil, err
	}
	if res.Plan != plan {
		return nil, fmt.Errorf("%s is of the plan %s", file, res.Plan)
	}
	return res, nil
}

func (r *results) write(file string) error {
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	tmp := file + ".new"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, file)
}

func (w *world) round(ctx context.Context, groups [][]cell, match *regexp.Regexp) (round, error) {
	commit, _ := exec.CommandContext(ctx, "git", "describe", "--always", "--dirty").Output()
	load, _ := os.ReadFile("/proc/loadavg")
	r := round{Began: time.Now().UTC().Truncate(time.Second), Commit: strings.TrimSpace(string(commit)), Load: strings.TrimSpace(string(load))}
	for _, group := range groups {
		for _, i := range rand.Perm(len(group)) {
			c := group[i]
			if !match.MatchString(c.work + " " + c.variant + " " + c.line) {
				continue
			}
			m := w.measure(ctx, c)
			if ctx.Err() != nil {
				return r, ctx.Err()
			}
			fmt.Fprintf(os.Stderr, "%s %-28s %-22s %-16s %v %s\n", time.Now().Format(time.TimeOnly), c.work, c.variant, c.line, m.Values, m.Err)
			r.Measurements = append(r.Measurements, m)
		}
	}
	return r, nil
}

// measure fills one cell. A variant that fails is a result too.
func (w *world) measure(ctx context.Context, c cell) measurement {
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(c.limit, deadline))
	defer cancel()
	calm(ctx)
	m := measurement{Work: c.work, Variant: c.variant, Line: c.line}
	var err error
	if c.measure != nil {
		m.Values, err = c.measure(ctx, w)
	} else {
		m.Values, m.CPU, err = w.client(ctx, c)
	}
	if err != nil {
		m.Err = err.Error()
	}
	return m
}

// What a flow leaves behind when its client ends (kubectl port-forward, the API server, kubelet and containerd go on with it for up to a second) must not
// be in the way of the next measurement: its machine is calm when no more than calmShare of it was used in calmLook. After calmWait it begins all the same.
const (
	calmShare = .25
	calmLook  = 40 * time.Millisecond
	calmWait  = 3 * time.Second
)

// calm waits until the machine is.
func calm(ctx context.Context) {
	for began := time.Now(); time.Since(began) < calmWait; {
		before, start := busy(), time.Now()
		if sleep(ctx, calmLook) != nil {
			return
		}
		if busy()-before <= calmShare*time.Since(start).Seconds()*float64(runtime.NumCPU()) {
			return
		}
	}
}

// busy is how long processors have worked so far, in seconds: user, nice, system, irq and softirq of proc_stat(5).
func busy() float64 {
	text, _ := os.ReadFile("/proc/stat")
	first, _, _ := strings.Cut(string(text), "\n")
	sum := 0.0
	for i, field := range strings.Fields(first) {
		if i == 1 || i == 2 || i == 3 || i == 6 || i == 7 {
			n, _ := strconv.ParseFloat(field, 64)
			sum += n
		}
	}
	return sum / ticks
}

// client runs a client and looks at the processes before and after.
func (w *world) client(ctx context.Context, c cell) (values, map[string]float64, error) {
	before, err := processes(w.lab)
	if err != nil {
		return nil, nil, err
	}
	resetPeaks(before)
	out, err := output(w.on(ctx, c.place, append([]string{w.bin("bench"), "client"}, c.args...)...))
	if err != nil {
		return nil, nil, err
	}
	after, err := processes(w.lab)
	if err != nil {
		return nil, nil, err
	}
	v := values{}
	if err := json.Unmarshal(bytes.TrimSpace(out), &v); err != nil {
		return nil, nil, err
	}
	for _, p := range after {
		if k := memoryOf[p.kind]; k != "" && v["bytes"] > 0 && (strings.HasPrefix(p.place, "node") || p.place == c.place) {
			v[k+" peak MB"] = max(v[k+" peak MB"], p.top/1e6)
		}
	}
	return v, spent(before, after, c.place), nil
}

// memoryOf names the processes whose memory is told.
var memoryOf = map[string]string{"user daemon": "user daemon", "traffic-manager": "manager", "traffic-agent": "agent", "root daemon": "root daemon"}

func machine() map[string]string {
	m := map[string]string{"cores": fmt.Sprint(runtime.NumCPU()), "go": runtime.Version(), "arch": runtime.GOARCH}
	if text, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m["kernel"] = strings.TrimSpace(string(text))
	}
	if text, err := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control"); err == nil { // of the lab, too: namespaces begin with it
		m["congestion control"] = strings.TrimSpace(string(text))
	}
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
			m["cpu"] = strings.TrimSpace(v)
			break
		}
	}
	text, _ = os.ReadFile("/proc/meminfo")
	if first, _, ok := strings.Cut(string(text), "\n"); ok {
		m["memory"] = strings.Join(strings.Fields(first)[1:], " ")
	}
	return m
}
