package rootapi

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/doppel-dev/doppel/internal/uerr"
)

func good() Network {
	return Network{
		Name:    "doppel0",
		Addrs:   []netip.Prefix{netip.MustParsePrefix("10.77.0.1/32"), netip.MustParsePrefix("fd77::1/128")},
		Routes:  []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12")},
		Exclude: []netip.Prefix{netip.MustParsePrefix("10.96.0.1/32")},
		DNS: &DNS{
			Listen: netip.MustParseAddrPort("127.0.0.1:5300"), Listen6: netip.MustParseAddrPort("[::1]:5300"),
			Scoped: []netip.AddrPort{netip.MustParseAddrPort("[fe80::7%eth0]:5300")},
			Server: netip.MustParseAddr("198.18.0.2"), Domains: []string{"search.doppel.internal", "~cluster.local", "~web.shop", "~_x.example", "~."},
		},
	}
}

func TestValidate(t *testing.T) {
	if err := (Network{}).Validate(); err != nil {
		t.Errorf("zero: %v", err)
	}
	if err := good().Validate(); err != nil {
		t.Errorf("good: %v", err)
	}
	for name, change := range map[string]func(*Network){
		"no name":            func(n *Network) { n.Name = "" },
		"another's name":     func(n *Network) { n.Name = "tailscale0" },
		"long name":          func(n *Network) { n.Name = "doppel0123456789" },
		"path":               func(n *Network) { n.Name = "doppel/../x" },
		"format":             func(n *Network) { n.Name = "doppel%d" },
		"small mtu":          func(n *Network) { n.MTU = 576 },
		"large mtu":          func(n *Network) { n.MTU = 65536 },
		"loopback address":   func(n *Network) { n.Addrs[0] = netip.MustParsePrefix("127.0.0.1/32") },
		"multicast address":  func(n *Network) { n.Addrs[0] = netip.MustParsePrefix("224.0.0.1/32") },
		"zero address":       func(n *Network) { n.Addrs[0] = netip.Prefix{} },
		"mapped address":     func(n *Network) { n.Addrs[0] = netip.MustParsePrefix("::ffff:10.0.0.1/128") },
		"host bits":          func(n *Network) { n.Routes[0] = netip.MustParsePrefix("10.96.0.1/12") },
		"zero route":         func(n *Network) { n.Routes[0] = netip.Prefix{} },
		"host bits excluded": func(n *Network) { n.Exclude[0] = netip.MustParsePrefix("10.96.0.1/12") },
		"many routes":        func(n *Network) { n.Routes = make([]netip.Prefix, MaxRoutes+1) },
		"wildcard listener":  func(n *Network) { n.DNS.Listen = netip.MustParseAddrPort("0.0.0.0:53") },
		"listener elsewhere": func(n *Network) { n.DNS.Listen = netip.MustParseAddrPort("10.0.0.1:53") },
		"no port":            func(n *Network) { n.DNS.Listen = netip.MustParseAddrPort("127.0.0.1:0") },
		"scoped, no link":    func(n *Network) { n.DNS.Scoped[0] = netip.MustParseAddrPort("[fe80::7]:53") },
		"scoped, global":     func(n *Network) { n.DNS.Scoped[0] = netip.MustParseAddrPort("[fd00::7]:53") },
		"many scoped":        func(n *Network) { n.DNS.Scoped = make([]netip.AddrPort, MaxScoped+1) },
		"loopback server":    func(n *Network) { n.DNS.Server = netip.MustParseAddr("127.0.0.1") },
		"link-local server":  func(n *Network) { n.DNS.Server = netip.MustParseAddr("fe80::1%eth0") },
		"no domain":          func(n *Network) { n.DNS.Domains[0] = "" },
		"odd domain":         func(n *Network) { n.DNS.Domains[0] = "~a b" },
		"upper case domain":  func(n *Network) { n.DNS.Domains[0] = "Example.com" },
		"dots":               func(n *Network) { n.DNS.Domains[0] = "a..b" },
		"many domains":       func(n *Network) { n.DNS.Domains = slices.Repeat([]string{"a"}, MaxDomains+1) },
		"long domains": func(n *Network) {
			n.DNS.Domains = slices.Repeat([]string{strings.Repeat("abcdefgh.", 27) + "x"}, MaxDomains)
		},
		"listener6 elsewhere": func(n *Network) { n.DNS.Listen6 = netip.MustParseAddrPort("[::]:53") },
	} {
		n := good()
		change(&n)
		if n.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestMessageRoundTrip(t *testing.T) {
	n := good()
	for _, m := range []Message{
		{ID: 1, Op: OpSetNetwork, Network: &n},
		{ID: 2, Op: OpAdoptNetwork, Network: &n},
		{ID: 3, Op: OpSetNetwork, Network: &Network{}},
		{ID: 4, Op: OpMarkedSocket, Socket: UDP6},
		{ID: 5, Op: OpReply, State: &State{DNSMode: DNSNone, Resolvers: []netip.AddrPort{netip.MustParseAddrPort("[fe80::1%eth0]:53")}}},
		{ID: 6, Op: OpReply, Error: uerr.New(uerr.Denied, "ask", "no")},
		{ID: 7, Op: OpPing},
		{ID: 7, Op: OpPong},
		{ID: 8, Op: OpQuit},
		{ID: 9, Op: OpQuit, IfIdle: true},
		{ID: 9, Op: OpVersion},
		{ID: 10, Op: OpLogLevel, Level: "debug", Seconds: 60},
		{Op: OpChanged, State: &State{Seq: 3, DNSMode: DNSNftables}},
	} {
		b, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		got, err := Decode(b)
		if err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		b2, _ := got.Encode()
		if string(b2) != string(b) {
			t.Errorf("%s became %s", b, b2)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	for _, s := range []string{
		``, `null`, `[]`, `{}`, `{"id":1}`, `{"id":1,"op":"format-disk"}`,
		`{"id":1,"op":"version"} {}`, `{"id":1,"op":"version"}x`,
		`{"id":1,"op":"version","uid":0}`,
		`{"id":-1,"op":"version"}`,
		`{"id":1,"op":"version","network":{}}`,
		`{"id":1,"op":"version","socket":"udp4"}`,
		`{"id":1,"op":"set-network"}`,
		`{"id":1,"op":"set-network","network":{"name":"doppel0","persist":true}}`,
		`{"id":1,"op":"set-network","network":{"name":"eth0"}}`,
		`{"id":1,"op":"set-network","network":{"name":"doppel0","routes":["10.0.0.1/8"]}}`,
		`{"id":1,"op":"set-network","network":{"name":"doppel0","routes":["10.0.0.0"]}}`,
		`{"id":1,"op":"set-network","network":{"name":"doppel0"},"socket":"udp4"}`,
		`{"id":1,"op":"marked-socket","socket":"ip4:icmp"}`,
		`{"id":1,"op":"marked-socket"}`,
		`{"id":1,"op":"ping","error":{"kind":"denied","error":"x"}}`,
		`{"id":1,"op":"changed"}`,
		`{"id":1,"op":"version","level":"debug"}`,
		`{"id":1,"op":"version","ifIdle":true}`,
		`{"id":1,"op":"log-level","level":"debug","seconds":-1}`,
		`{"id":1,"op":"log-level","level":"debug","seconds":604801}`,
		`{"id":1,"op":"log-level","level":"debug","socket":"udp4"}`,
		strings.Repeat(" ", MaxPacket) + `{"id":1,"op":"version"}`,
	} {
		if m, err := Decode([]byte(s)); err == nil {
			t.Errorf("%.80s: accepted as %+v", s, m)
		}
	}
}

// TestLargestFits shows that everything Validate lets through fits into a packet.
func TestLargestFits(t *testing.T) {
	n := good()
	n.Routes = nil
	long := netip.MustParseAddr("fdff:ffff:ffff:ffff:ffff:ffff:ffff:0000").As16()
	for i := range MaxRoutes {
		long[14], long[15] = byte(i>>8)|0x10, byte(i)
		n.Routes = append(n.Routes, netip.PrefixFrom(netip.AddrFrom16(long), 128))
	}
	for len(n.Exclude) < MaxExclude/4 { // beside full routes
		n.Exclude = append(n.Exclude, n.Routes[len(n.Exclude)])
	}
	if err := n.Validate(); err != nil {
		t.Fatal(err)
	}
	if _, err := (Message{ID: 1<<64 - 1, Op: OpSetNetwork, Network: &n}).Encode(); err != nil {
		t.Error(err)
	}
	if _, err := (Message{Op: OpReply, State: &State{Routes: n.Routes}}).Encode(); err != nil {
		t.Error(err)
	}
}

func FuzzDecode(f *testing.F) {
	n := good()
	for _, m := range []Message{
		{ID: 1, Op: OpSetNetwork, Network: &n},
		{ID: 4, Op: OpMarkedSocket, Socket: UDP6},
		{Op: OpPing},
		{Op: OpReply, Error: uerr.New(uerr.Denied, "ask", "no")},
		{Op: OpChanged, State: &State{}},
	} {
		b, _ := m.Encode()
		f.Add(b)
	}
	f.Add([]byte(`{"id":1,"op":"set-network","network":{"name":"doppel0","routes":["::/0"]}}`))
	f.Fuzz(func(t *testing.T, p []byte) {
		m, err := Decode(p)
		if err != nil {
			return
		}
		if m.Network != nil {
			if err := m.Network.Validate(); err != nil {
				t.Errorf("decoded an invalid network: %v", err)
			}
		}
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatalf("decoded but not encodable: %v", err)
		}
		if _, err := Decode(b); err != nil && len(b) <= MaxPacket {
			t.Errorf("%s: own form refused: %v", b, err)
		}
	})
}
