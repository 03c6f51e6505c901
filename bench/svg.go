package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// pictures are the plots by file name.
func (f *figures) pictures() map[string]string {
	return map[string]string{
		"tcp.svg":     f.bars("TCP, one flow: Gbit/s", "gbit/s", "TCP up, 1", "TCP down, 1"),
		"http.svg":    f.bars("HTTP, 8 connections: requests/s", "/s", "HTTP, 8"),
		"inwards.svg": f.bars("Inwards, HTTP, 8 connections: requests/s", "/s", "inwards: HTTP, 8"),
	}
}

// bars draws a bar for each work and variant: the median, with a line from the least to the most of the rounds.
func (f *figures) bars(title, unit string, works ...string) string {
	const left, width, row, gap = 240, 420, 20, 14
	type bar struct {
		name            string
		low, mid, high  float64
		doppel, newWork bool
	}
	var all []bar
	most := 0.0
	for _, w := range works {
		for i, v := range f.variants(w, "") {
			s := f.series(w, v, "", unit)
			b := bar{name: v, mid: median(s), low: math.Inf(1), newWork: i == 0, doppel: strings.HasPrefix(v, "doppel") || strings.HasPrefix(v, "agent")}
			for _, x := range s {
				if !math.IsNaN(x) {
					b.low, b.high = min(b.low, x), max(b.high, x)
				}
			}
			if math.IsNaN(b.mid) {
				continue
			}
			if len(works) > 1 {
				b.name = strings.Split(w, ",")[0] + ": " + v
			}
			most = max(most, b.high)
			all = append(all, b)
		}
	}
	var b strings.Builder
	y := 34.0
	for i, x := range all {
		if x.newWork && i > 0 {
			y += gap
		}
		at := func(v float64) float64 { return left + v/most*width }
		fill := "#9aa5b1"
		if x.doppel {
			fill = "#2f6fed"
		}
		fmt.Fprintf(&b, `<text x="%d" y="%.0f" text-anchor="end">%s</text><rect x="%d" y="%.0f" width="%.1f" height="14" fill="%s"/>`, left-8, y+12, html.EscapeString(x.name), left, y, at(x.mid)-left, fill)
		fmt.Fprintf(&b, `<path d="M%.1f %.0fH%.1f" stroke="#444"/><text x="%.1f" y="%.0f">%s</text>`+"\n", at(x.low), y+7, at(x.high), at(x.high)+6, y+12, number(x.mid))
		y += row
	}
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 %.0f" width="740" font-family="sans-serif" font-size="12">
<rect width="100%%" height="100%%" fill="#fff"/>
<text x="12" y="20" font-size="14" font-weight="bold">%s</text>
%s</svg>
`, y+10, html.EscapeString(title), b.String())
}
