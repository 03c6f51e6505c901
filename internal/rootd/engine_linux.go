package rootd

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"sync"

	"github.com/doppel-dev/doppel/internal/osdns"
	"github.com/doppel-dev/doppel/internal/osroute"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/tundev"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// engine keeps the machine in the state that the owner wants. It looks at the machine anew at every call: what is in force already costs nothing.
type engine struct {
	log        *slog.Logger
	resolvConf string
	nftErr     error // why nftables cannot be used, found out once at the start

	mu        sync.Mutex
	want      rootapi.Network    // guarded by mu
	link      osroute.Link       // guarded by mu; zero without a device
	suspended bool               // guarded by mu: the owner does not answer, no DNS capture
	state     rootapi.State      // guarded by mu: what is in force
	seq       uint64             // guarded by mu: of the last state
	capture   *osdns.Capture     // guarded by mu
	resolved  osdns.ResolvedLink // guarded by mu
}

// plan is a whole state, decided before anything is touched.
type plan struct {
	routes osroute.Plan
	dns    osdns.Plan
	sight  osdns.Sight
}

func newEngine(log *slog.Logger, cfg Config) *engine {
	table := fmt.Sprintf("doppel-dns-%d", os.Getpid()) // another rootd's, in a test or another user's, is its own
	probe := cfg.probe
	if probe == nil {
		probe = osdns.Probe
	}
	e := &engine{log: log, resolvConf: cfg.ResolvConf, capture: osdns.NewCapture(table), nftErr: probe(table)}
	if e.nftErr != nil {
		log.Warn("nftables is not usable", "err", e.nftErr)
	}
	return e
}

// plan decides what n means on this machine now.
func (e *engine) plan(n rootapi.Network, link osroute.Link) (plan, error) {
	want := wantDNS(n)
	sight, err := osdns.LookAt(e.resolvConf, link.Index, want.Server)
	if err != nil {
		return plan{}, fmt.Errorf("find resolvers: %w", err)
	}
	sight.NFTError = e.nftErr
	if n.DNS != nil && n.DNS.ResolvedFails && sight.ResolvedError == nil {
		sight.ResolvedError = errors.New("it did not ask the user daemon")
	}
	p := plan{sight: sight, dns: osdns.Choose(sight.Facts, want)}
	others, err := link.Others()
	if err != nil {
		return plan{}, err
	}
	routes := n.Routes
	if p.dns.Mode == osdns.Resolved {
		routes = append(slices.Clone(routes), netip.PrefixFrom(want.Server, want.Server.BitLen()))
	}
	resolvers := slices.Clone(sight.Uplinks)
	for _, r := range sight.Resolvers {
		resolvers = append(resolvers, r.Addr)
	}
	p.routes, err = osroute.Make(osroute.Want{Routes: routes, Exclude: n.Exclude, Resolvers: resolvers}, others)
	return p, err
}

func wantDNS(n rootapi.Network) osdns.Want {
	if n.DNS == nil {
		return osdns.Want{}
	}
	return osdns.Want{Listen: n.DNS.Listen, Listen6: n.DNS.Listen6, Scoped: n.DNS.Scoped, Server: n.DNS.Server, Domains: n.DNS.Domains}
}

// set makes n the machine's state for a peer with this uid. The file is the new device's, if one was made. With adopt the device must be
// there already.
func (e *engine) set(n rootapi.Network, uid uint32, adopt bool) (rootapi.State, *os.File, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if n.IsZero() {
		err := e.clearLocked()
		p, perr := e.plan(n, osroute.Link{})
		return state(n, p, nil), nil, errors.Join(err, perr)
	}
	link, err := e.findLocked(n.Name, uid, adopt)
	if err != nil {
		return rootapi.State{}, nil, err
	}
	p, err := e.plan(n, link)
	if err != nil {
		return rootapi.State{}, nil, err
	}
	// From here on the machine changes.
	f, err := e.linkLocked(n, link, uid)
	if err != nil {
		return rootapi.State{}, nil, err
	}
	before := e.want
	e.want, e.suspended = n, false
	p, warnings, err := e.applyLocked(p)
	switch {
	case err != nil && f != nil:
		f.Close()
		return rootapi.State{}, nil, errors.Join(err, e.clearLocked())
	case err != nil: // the owner still holds the device, and has other clusters' flows in it
		e.want = before
		return rootapi.State{}, nil, errors.Join(err, e.backLocked())
	}
	e.noteLocked(state(n, p, warnings))
	e.log.Info("network set", "interface", e.link.Name, "routes", len(p.routes.Routes), "dns", string(p.dns.Mode), "why", p.dns.Reason, "uid", uid, "created", f != nil)
	return e.state, f, nil
}

// backLocked puts what was in force before back in force. The device of a user daemon that wanted it adopted is left as it is: it may ask again.
func (e *engine) backLocked() error {
	if e.want.IsZero() {
		e.link = osroute.Link{}
		return e.releaseLocked()
	}
	return e.recheckLocked()
}

// findLocked returns the device to use, or a zero link when one is to be made.
func (e *engine) findLocked(name string, uid uint32, adopt bool) (osroute.Link, error) {
	l, err := osroute.Find(name)
	if ue, ok := errors.AsType[*uerr.Error](err); ok && ue.Kind == uerr.NotFound {
		if adopt {
			return osroute.Link{}, uerr.Wrap(err, uerr.NotFound, "", "adopt")
		}
		return osroute.Link{}, nil
	}
	if err != nil {
		return osroute.Link{}, err
	}
	// The kernel tells whose it is; only a doppel-rootd gives devices to a user who is not root.
	switch {
	case !l.TUN:
		hint := fmt.Sprintf("see what it is with: ip -d link show %s", name)
		return osroute.Link{}, uerr.New(uerr.Conflict, hint, "interface %s exists already, and is not one of doppel's", name)
	case l.Owner != uid: // each has a root daemon of their own
		hint := fmt.Sprintf("ask them to quit; if none of theirs runs any more: sudo ip link delete %s", name)
		return osroute.Link{}, uerr.New(uerr.Conflict, hint, "user %d is connected already, with interface %s", l.Owner, name)
	}
	if !adopt && l.Index != e.link.Index {
		// A user daemon that hangs, and lost its rootd, still holds it. Its user asks for a new one.
		if err := l.Remove(); err != nil {
			return osroute.Link{}, fmt.Errorf("remove interface %s: %w", name, err)
		}
		return osroute.Link{}, nil
	}
	return l, nil
}

// linkLocked makes the device of e what n wants; found is what findLocked found.
func (e *engine) linkLocked(n rootapi.Network, found osroute.Link, uid uint32) (*os.File, error) {
	if e.link.Index != 0 && e.link.Index != found.Index {
		if err := e.link.Remove(); err != nil {
			return nil, fmt.Errorf("remove interface %s: %w", e.link.Name, err)
		}
		e.link = osroute.Link{}
	}
	if found.Index != 0 {
		e.link = found
		return nil, nil
	}
	f, name, err := tundev.Open(n.Name, n.MTU, uid)
	if err != nil {
		return nil, err
	}
	if e.link, err = osroute.Find(name); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// applyLocked puts p in force on e.link, and returns what came of it: where systemd-resolved refuses, DNS takes the next way.
func (e *engine) applyLocked(p plan) (plan, []string, error) {
	mtu := e.want.MTU
	if mtu == 0 {
		mtu = tundev.DefaultMTU
	}
	dns := p.dns
	if e.suspended {
		dns = osdns.Plan{Mode: osdns.None}
	}
	// Addresses and routes first: systemd-resolved asks only where it can reach.
	warnings, err := e.link.Apply(mtu, e.want.Addrs, slices.Concat(p.routes.Routes, dns.Routes()))
	if err != nil {
		return plan{}, nil, err
	}
	err = e.resolved.Set(e.link.Index, dns.Link)
	if err != nil && dns.Mode == osdns.Resolved {
		p.sight.ResolvedError = err
		p.dns = osdns.Choose(p.sight.Facts, wantDNS(e.want))
		return e.applyLocked(p)
	}
	if err != nil { // it was told before, and is not to be used any more
		e.log.Warn("systemd-resolved not told", "err", err)
	}
	return p, warnings, e.capture.Set(dns.Redirects)
}

// noteLocked notes what is in force now.
func (e *engine) noteLocked(st rootapi.State) {
	e.seq++
	st.Seq = e.seq
	e.state = st
}

// inForce is the state that is in force.
func (e *engine) inForce() rootapi.State {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.state
}

// recheck puts the wanted state in force again after the machine's resolvers, addresses or routes have changed.
func (e *engine) recheck() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.recheckLocked(); err != nil {
		if _, ferr := osroute.Find(e.link.Name); ferr == nil { // else the owner has just closed the device
			e.log.Warn("network not updated", "err", err)
		}
	}
}

func (e *engine) recheckLocked() error {
	if e.link.Index == 0 {
		return nil
	}
	l, err := osroute.Find(e.link.Name)
	if err != nil || l.Index != e.link.Index {
		// The owner has closed the device; its queries still come in until it says otherwise.
		return err
	}
	e.link = l
	p, err := e.plan(e.want, l)
	if err != nil {
		return err
	}
	p, warnings, err := e.applyLocked(p)
	if err != nil {
		return err
	}
	st := state(e.want, p, warnings)
	if st.Seq = e.state.Seq; !reflect.DeepEqual(st, e.state) {
		e.noteLocked(st)
	}
	return nil
}

// suspend takes the DNS capture away, or puts it back.
func (e *engine) suspend(yes bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.suspended == yes {
		return
	}
	e.suspended = yes
	var err error
	if yes { // first, and also without a device
		err = e.releaseLocked()
	}
	err = errors.Join(err, e.recheckLocked())
	e.log.Warn("owner's answers to pings", "missing", yes, "err", err)
}

// clear removes everything.
func (e *engine) clear() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.clearLocked()
}

func (e *engine) clearLocked() error {
	err := e.releaseLocked()
	if e.link.Index != 0 {
		err = errors.Join(err, e.link.Remove()) // addresses and routes go with it
		e.log.Info("network removed", "interface", e.link.Name)
	}
	e.want, e.link, e.suspended, e.state = rootapi.Network{}, osroute.Link{}, false, rootapi.State{}
	return err
}

// release gives up what must not outlive this process, and leaves the device to its owner.
func (e *engine) release() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.releaseLocked()
}

func (e *engine) releaseLocked() error {
	return errors.Join(e.capture.Set(nil), e.resolved.Set(0, osdns.LinkDNS{}))
}

// modes are what the plan's ways are called in a State.
var modes = map[osdns.Mode]string{
	osdns.Resolved: rootapi.DNSResolved, osdns.NFTables: rootapi.DNSNftables, osdns.Routed: rootapi.DNSRouted, osdns.None: rootapi.DNSNone,
}

func state(n rootapi.Network, p plan, warnings []string) rootapi.State {
	st := rootapi.State{Name: n.Name, Routes: p.routes.Routes, DNSMode: modes[p.dns.Mode], DNSReason: p.dns.Reason}
	for _, d := range p.sight.Search {
		if n.DNS == nil || !slices.Contains(n.DNS.Domains, d) { // ours, which systemd-resolved shows to everybody
			st.SearchDomains = append(st.SearchDomains, d)
		}
	}
	for _, a := range p.sight.Upstreams() {
		st.Resolvers = append(st.Resolvers, netip.AddrPortFrom(a, osdns.Port))
	}
	for _, r := range p.dns.Routed {
		st.Bypass = append(st.Bypass, rootapi.Bypass{Resolver: r.Addr, Link: r.Link})
	}
	st.Warnings = bound(slices.Concat(p.routes.Warnings, warnings, p.dns.Warnings))
	return st
}

// bound keeps the warnings within a message.
func bound(w []string) []string {
	const most = 50
	if len(w) > most {
		w = append(w[:most:most], fmt.Sprintf("and %d more", len(w)-most))
	}
	return w
}
