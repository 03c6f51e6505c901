package cli

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// whyFlags are the flags of why.
type whyFlags struct {
	headers      []string
	method, path string
}

func (a *app) whyCmd() *cobra.Command {
	req, f := localapi.WhyRequest{Last: 20}, whyFlags{}
	c := &cobra.Command{
		Use:   "why NAME",
		Short: "Show which rule sends a request to the app or to a laptop, and where the last ones went",
		Long: fmt.Sprintf(`Why asks the traffic-agents of an intercept, wiretap or replace of yours what they do with the ports that it takes: the rules of everybody
who has some of the traffic, in the order in which they are tried, and where the last connections and requests have gone and why.

With --header, --path or --method it is about one such request, and says of each rule whether it takes it.

An agent remembers the last %d connections and requests of a port, with method and path but without query, headers and content, for as long
as there is an intercept.`, control.MaxDecisions),
		Example: `  doppel why web
  doppel why web --header "x-user: louise" --path /cart`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			req.Name = args[0]
			if c.Flags().Changed("header") || c.Flags().Changed("path") || c.Flags().Changed("method") {
				var err error
				if req.Request, err = f.request(); err != nil {
					return err
				}
			}
			return a.whyRun(c.Context(), req)
		},
	}
	c.Flags().StringArrayVarP(&f.headers, "header", "H", nil, "a header of the request: \"NAME: VALUE\"")
	c.Flags().StringVar(&f.path, "path", "/", "the request's path")
	c.Flags().StringVar(&f.method, "method", "GET", "the request's method")
	c.Flags().IntVar(&req.Last, "last", req.Last, fmt.Sprintf("how many connections and requests are shown, at most %d; 0: none", control.MaxDecisions))
	useFlag(c.Flags(), &req.Use, "the one with that intercept")
	return c
}

// request is the one that the flags tell of.
func (f *whyFlags) request() (*control.Request, error) {
	r := &control.Request{Verb: f.method}
	r.Target, _, _ = strings.Cut(f.path, "?")
	if !strings.HasPrefix(r.Target, "/") && r.Target != "*" {
		return nil, uerr.New(uerr.Usage, "for example: --path /cart", "--path %s does not begin with a slash", f.path)
	}
	for _, h := range f.headers {
		name, value, ok := strings.Cut(h, ":")
		if name = strings.TrimSpace(name); !ok || name == "" {
			return nil, uerr.New(uerr.Usage, `for example: --header "x-user: louise"`, "--header %q is no header", h)
		}
		r.Fields = append(r.Fields, control.Header{Name: name, Value: strings.TrimSpace(value)})
	}
	return r, nil
}

func (a *app) whyRun(ctx context.Context, req localapi.WhyRequest) error {
	if req.Last < 0 || req.Last > control.MaxDecisions {
		return uerr.New(uerr.Usage, "for example: --last 50", "--last %d: want 0 to %d", req.Last, control.MaxDecisions)
	}
	var why localapi.Why
	if err := a.call(ctx, localapi.MethodWhy, req, &why); err != nil {
		return err
	}
	return a.print(why, func(w io.Writer) { writeWhy(w, req.Request, why) })
}

// writeWhy is the text form.
func writeWhy(w io.Writer, r *control.Request, why localapi.Why) {
	in := why.Intercept
	fmt.Fprintf(w, "%s: %s %s/%s, %s\n", in.Name, in.Kind, in.Namespace, in.Workload, in.State)
	if in.Message != "" {
		fmt.Fprintf(w, "  %s\n", in.Message)
	}
	for _, p := range why.Ports {
		writeRules(w, r, p)
	}
	if r == nil && len(why.Decisions) > 0 {
		writeDecisions(w, why)
	}
	for _, s := range []struct {
		pods []string
		what string
	}{{why.Differing, "has other rules: they are on their way to it"}, {why.Silent, "has not answered: its agent may be older than the traffic-manager"}} {
		for _, pod := range s.pods {
			fmt.Fprintf(w, "Pod %s %s\n", pod, s.what)
		}
	}
}

// writeRules shows the rules of a port, or what they do with a request.
func writeRules(w io.Writer, r *control.Request, p control.PortRules) {
	if r == nil {
		fmt.Fprintf(w, "Port %d/%s:\n", p.Port.Number, p.Port.Protocol)
	} else {
		fmt.Fprintf(w, "%s %s on port %d goes to %s:\n", r.Verb, r.Target, p.Port.Number, taker(p.Rules, p.Taker))
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	n, decided := 0, false
	for _, rule := range p.Rules {
		number, what := "copy", rule.Match.String()
		if !rule.Wiretap {
			n++
			number = strconv.Itoa(n) + "."
		}
		switch {
		case !rule.Match.IsZero():
		case rule.Wiretap:
			what = "everything"
		default:
			what = "everything else"
		}
		fmt.Fprintf(t, "  %s\t%s\t%s", number, what, whose(rule))
		if r != nil {
			fmt.Fprintf(t, "\t%s", verdict(rule, decided))
			decided = decided || !rule.Wiretap && rule.Unmet == ""
		}
		fmt.Fprintln(t)
	}
	if !takesRest(p.Rules) {
		fmt.Fprintf(t, "  %d.\teverything else\tthe app\n", n+1)
	}
	_ = t.Flush() // to the terminal, as every line that is printed
}

// takesRest says whether some intercept leaves nothing to the app.
func takesRest(rules []control.Rule) bool {
	for _, r := range rules {
		if !r.Wiretap && r.Match.IsZero() {
			return true
		}
	}
	return false
}

func verdict(r control.Rule, decided bool) string {
	switch {
	case r.Unmet == r.Match.String():
		return "no"
	case r.Unmet != "":
		return "no: not " + r.Unmet
	case r.Wiretap:
		return "yes: it gets a copy"
	case decided:
		return "yes, but an earlier rule has it"
	}
	return "yes"
}

// whose laptop a rule leads to.
func whose(r control.Rule) string {
	who := "the laptop of " + cmp.Or(r.User, "somebody")
	if r.Mine {
		who = "this laptop"
	}
	if r.Away {
		who += ", which does not answer: the app instead"
	}
	if r.Name != "" {
		who += fmt.Sprintf(" (%s since %s)", r.Name, r.Since.Local().Format(time.TimeOnly))
	}
	return who
}

// taker is who has something, by the intercept's UID.
func taker(rules []control.Rule, uid string) string {
	if uid == "" {
		return "the app"
	}
	for _, r := range rules {
		if r.Intercept == uid {
			if r.Mine {
				return "this laptop"
			}
			return "the laptop of " + cmp.Or(r.User, "somebody")
		}
	}
	return "a laptop whose intercept has ended"
}

func writeDecisions(w io.Writer, why localapi.Why) {
	fmt.Fprintln(w, "Last:")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "  TIME\tPOD\tPORT\tFROM\tWHAT\tWENT TO")
	for _, d := range why.Decisions {
		what := "connection"
		switch {
		case d.Method != "":
			what = printable(d.Method + " " + d.Path)
		case d.Port.Protocol == "UDP":
			what = "datagrams"
		}
		var rules []control.Rule
		for _, p := range why.Ports {
			if p.Port == d.Port {
				rules = p.Rules
			}
		}
		to := taker(rules, d.Taker)
		switch {
		case d.Why != "":
			to += ": " + printable(d.Why)
		case d.Taker == "":
			to += ": no rule took it"
		}
		fmt.Fprintf(t, "  %s\t%s\t%d\t%v\t%s\t%s\n", d.At.Local().Format(time.TimeOnly), d.Pod, d.Port.Number, d.Client, what, to)
	}
	_ = t.Flush()
}

// printable leaves nothing in a client's words that a terminal would obey.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}
