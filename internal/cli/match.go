package cli

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"github.com/doppel-dev/doppel/internal/match"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// matchFlags are the flags that choose HTTP requests; all given must match.
type matchFlags struct {
	set                             *pflag.FlagSet
	regexps, headers, methods       []string
	pathEqual, pathPrefix, pathExpr string
}

func (m *matchFlags) register(f *pflag.FlagSet) {
	m.set = f
	f.StringArrayVar(&m.regexps, "http-match", nil, "only requests with a header whose whole value matches: HEADER=REGEX; \"all\" for all of them")
	f.StringArrayVar(&m.headers, "http-header", nil, "only requests with a header: HEADER=VALUE, HEADER^=PREFIX or HEADER~=REGEX")
	f.StringVar(&m.pathEqual, "http-path-equal", "", "only requests for this path")
	f.StringVar(&m.pathPrefix, "http-path-prefix", "", "only requests whose path begins with this")
	f.StringVar(&m.pathExpr, "http-path-regexp", "", "only requests whose whole path matches this")
	f.StringSliceVar(&m.methods, "http-method", nil, "only requests with one of these methods")
}

// all says that the user has asked for all requests in so many words.
func (m *matchFlags) all() bool { return slices.Contains(m.regexps, "all") }

// rule is what the flags say together.
func (m *matchFlags) rule() (match.Rule, error) {
	var r match.Rule
	add := func(flag, value string, parse func(string) (match.Header, error)) error {
		h, err := parse(value)
		if err != nil {
			return uerr.Wrap(err, uerr.Usage, fmt.Sprintf("for example: --%s=x-user=louise", flag), "--%s", flag)
		}
		r.Headers = append(r.Headers, h)
		return nil
	}
	for _, v := range m.regexps {
		if v == "all" {
			continue
		}
		if err := add("http-match", v, match.ParseHeaderRegexp); err != nil {
			return r, err
		}
	}
	for _, v := range m.headers {
		if err := add("http-header", v, match.ParseHeader); err != nil {
			return r, err
		}
	}
	if m.set == nil { // they are no flags of this command
		return r, nil
	}
	for _, name := range []string{"http-path-equal", "http-path-prefix", "http-path-regexp", "http-method"} {
		if f := m.set.Lookup(name); f.Changed && strings.Trim(f.Value.String(), "[]") == "" { // a variable that is not set, most likely
			return r, uerr.New(uerr.Usage, "leave it out for all requests", "--%s is empty", name)
		}
	}
	for op, v := range map[match.Op]string{match.Equal: m.pathEqual, match.Prefix: m.pathPrefix, match.Regexp: m.pathExpr} {
		switch {
		case v == "":
		case r.Path != nil:
			return r, uerr.New(uerr.Usage, "choose one of --http-path-equal, --http-path-prefix and --http-path-regexp", "there can be one condition on the path")
		default:
			r.Path = &match.Text{Op: op, Value: v}
		}
	}
	for _, v := range m.methods {
		r.Methods = append(r.Methods, strings.ToUpper(v))
	}
	if _, err := match.Compile(r); err != nil {
		return r, uerr.Wrap(err, uerr.Usage, "see: doppel intercept --help", "the match cannot be used")
	}
	return r, nil
}
