package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// figures are the medians and ratios of one file of raw figures.
type figures struct {
	results
	at map[string][]measurement // by work, variant and line; one a round, in their order
}

func key(work, variant, line string) string { return work + "|" + variant + "|" + line }

func figuresOf(r results) *figures {
	f := &figures{results: r, at: map[string][]measurement{}}
	for i, r := range r.Rounds {
		for _, m := range r.Measurements {
			k := key(m.Work, m.Variant, m.Line)
			for len(f.at[k]) < i { // an earlier round lacks it
				f.at[k] = append(f.at[k], measurement{})
			}
			f.at[k] = append(f.at[k], m)
		}
	}
	return f
}

// series are a quantity's figures by round; NaN where there is none.
func (f *figures) series(work, variant, line, unit string) []float64 {
	var out []float64
	for _, m := range f.at[key(work, variant, line)] {
		v, ok := m.Values[unit]
		if !ok {
			v = math.NaN()
		}
		out = append(out, v)
	}
	return out
}

// median of those that are there; NaN if none is.
func median(all []float64) float64 {
	there := slices.DeleteFunc(slices.Clone(all), math.IsNaN)
	if len(there) == 0 {
		return math.NaN()
	}
	slices.Sort(there)
	n := len(there)
	return (there[(n-1)/2] + there[n/2]) / 2
}

func (f *figures) median(work, variant, line, unit string) float64 {
	return median(f.series(work, variant, line, unit))
}

// paired is the median of what fn makes of two series, round by round: what disturbs a round disturbs both.
func paired(a, b []float64, fn func(x, y float64) float64) float64 {
	var out []float64
	for i := range min(len(a), len(b)) {
		out = append(out, fn(a[i], b[i]))
	}
	return median(out)
}

func quotient(x, y float64) float64   { return x / y }
func difference(x, y float64) float64 { return x - y }

// variants of a work, in the order in which a reader wants them.
func (f *figures) variants(work, line string) []string {
	order := []string{
		"direct", "direct, TLS", "raw stream", "kubectl port-forward", "doppel, service proxy", "doppel, port-forward", "doppel, direct",
		"no agent", "bare proxy", "agent, no intercept", "agent, passed through", "agent, matched: laptop", "agent, all: laptop",
	}
	var out []string
	for _, v := range order {
		if len(f.at[key(work, v, line)]) > 0 {
			out = append(out, v)
		}
	}
	return out
}

// works are the names of a line's measurements that begin with prefix and have a unit, in their order of the plan.
func (f *figures) works(prefix, line, unit string) []string {
	var out []string
	for _, r := range f.Rounds {
		for _, m := range r.Measurements {
			if _, ok := m.Values[unit]; ok && strings.HasPrefix(m.Work, prefix) && m.Line == line && !slices.Contains(out, m.Work) {
				out = append(out, m.Work)
			}
		}
	}
	return out
}

// number writes a figure with three digits that say something.
func number(x float64) string {
	switch a := math.Abs(x); {
	case math.IsNaN(x):
		return "–"
	case a >= 1000:
		s := fmt.Sprintf("%.0f", x)
		return s[:len(s)-3] + "," + s[len(s)-3:]
	case a >= 100:
		return fmt.Sprintf("%.0f", x)
	case a >= 10:
		return fmt.Sprintf("%.1f", x)
	default:
		return fmt.Sprintf("%.2f", x)
	}
}

// table has a row for each work and a column for each variant; cell writes what is in it.
func (f *figures) table(b *strings.Builder, works []string, line string, cell func(work, variant string) string) {
	var columns []string
	for _, w := range works {
		for _, v := range f.variants(w, line) {
			if !slices.Contains(columns, v) {
				columns = append(columns, v)
			}
		}
	}
	fmt.Fprintf(b, "| |%s|\n|---|%s\n", " "+strings.Join(columns, " | ")+" ", strings.Repeat("---|", len(columns)))
	for _, w := range works {
		fmt.Fprintf(b, "| %s |", w)
		for _, v := range columns {
			fmt.Fprintf(b, " %s |", cell(w, v))
		}
		b.WriteString("\n")
	}
	b.WriteString("\n")
}

// one writes a quantity's median, and how it compares with the first variant's in base.
func (f *figures) one(line, unit, base string) func(work, variant string) string {
	return func(work, variant string) string {
		m := f.median(work, variant, line, unit)
		if math.IsNaN(m) {
			return f.failed(work, variant, line)
		}
		s := number(m)
		if r := paired(f.series(work, variant, line, unit), f.series(work, base, line, unit), quotient); variant != base && !math.IsNaN(r) {
			s += fmt.Sprintf(" (%.2f)", r)
		}
		return s
	}
}

// timesOf writes the rate and both quantiles.
func (f *figures) timesOf(line string) func(work, variant string) string {
	return func(work, variant string) string {
		rate := f.median(work, variant, line, "/s")
		if math.IsNaN(rate) {
			return f.failed(work, variant, line)
		}
		return fmt.Sprintf("%s/s; %s, %s ms", number(rate), number(f.median(work, variant, line, "p50 ms")), number(f.median(work, variant, line, "p99 ms")))
	}
}

// failed says why there is no figure.
func (f *figures) failed(work, variant, line string) string {
	ms := f.at[key(work, variant, line)]
	if i := slices.IndexFunc(ms, func(m measurement) bool { return m.Err != "" }); i >= 0 {
		return "failed"
	}
	return ""
}

// cpuPer is the CPU time of each kind of process for so much of what a work is about, as seconds times scale. What is below least is left out.
func (f *figures) cpuPer(b *strings.Builder, work, unit string, much, scale, least float64) {
	kinds := map[string]float64{}
	variants := f.variants(work, "")
	cpu := func(variant, kind string) float64 {
		var out []float64
		for _, m := range f.at[key(work, variant, "")] {
			if m.Values[unit] > 0 {
				out = append(out, scale*m.CPU[kind]*much/m.Values[unit])
			}
		}
		return median(out)
	}
	for _, v := range variants {
		for _, m := range f.at[key(work, v, "")] {
			for k := range m.CPU {
				if c := cpu(v, k); c >= least {
					kinds[k] = max(kinds[k], c)
				}
			}
		}
	}
	names := slices.SortedFunc(mapsKeys(kinds), func(a, b string) int { return cmp.Compare(kinds[b], kinds[a]) })
	fmt.Fprintf(b, "| %s | %s |\n|---|%s\n", work, strings.Join(variants, " | "), strings.Repeat("---|", len(variants)))
	for _, k := range names {
		fmt.Fprintf(b, "| %s |", strings.NewReplacer("bench client", "client", "bench serve", "server").Replace(k))
		for _, v := range variants {
			if c := cpu(v, k); c >= least {
				fmt.Fprintf(b, " %s |", number(c))
			} else {
				b.WriteString(" |")
			}
		}
		b.WriteString("\n")
	}
	b.WriteString("\n")
}

func mapsKeys(m map[string]float64) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// report writes the page of the results files.
func report(_ context.Context, args []string) error {
	fl := flag.NewFlagSet("report", flag.ContinueOnError)
	dir := fl.String("dir", "docs", "where the page goes; its pictures go into performance/ below")
	if err := fl.Parse(args); err != nil {
		return err
	}
	all := map[string]*figures{}
	for _, file := range fl.Args() {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		var r results
		if err := json.Unmarshal(text, &r); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		all[r.Plan] = figuresOf(r)
	}
	if all["lan"] == nil {
		return errors.New("no file of the plan lan")
	}
	pictures := filepath.Join(*dir, "performance")
	if err := os.MkdirAll(pictures, 0o755); err != nil {
		return err
	}
	for name, svg := range all["lan"].pictures() {
		if err := os.WriteFile(filepath.Join(pictures, name), []byte(svg), 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(*dir, "performance.md"), []byte(page(all)), 0o644)
}
