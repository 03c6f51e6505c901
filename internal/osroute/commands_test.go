package osroute

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestCommands(t *testing.T) {
	have := Settings{MTU: 1400, Addrs: prefixes("198.18.0.1/32 198.18.0.9/32"), Routes: prefixes("10.96.0.0/16 10.1.0.0/16")}
	want := Settings{MTU: 1500, Addrs: prefixes("198.18.0.1/32 fd77::1/128"), Routes: prefixes("10.96.0.0/16 10.244.0.0/16 fd77:1::/64")}
	for goos, lines := range map[string]string{
		"darwin": `route -q -n delete -inet 10.1.0.0/16 -interface utun7
ifconfig utun7 inet 198.18.0.9/32 198.18.0.9 -alias
ifconfig utun7 mtu 1500 up
ifconfig utun7 inet6 fd77::1/128 alias
route -q -n add -inet 10.244.0.0/16 -interface utun7
route -q -n add -inet6 fd77:1::/64 -interface utun7
`,
		"windows": `netsh interface ipv4 delete route 10.1.0.0/16 utun7 store=active
netsh interface ipv4 delete address utun7 198.18.0.9 store=active
netsh interface ipv4 set subinterface utun7 mtu=1500 store=active
netsh interface ipv6 set subinterface utun7 mtu=1500 store=active
netsh interface ipv6 add address utun7 fd77::1/128 store=active
netsh interface ipv4 add route 10.244.0.0/16 utun7 store=active
netsh interface ipv6 add route fd77:1::/64 utun7 store=active
`,
		"plan9": "",
	} {
		var got strings.Builder
		for _, c := range Commands(goos, "utun7", have, want) {
			fmt.Fprintln(&got, strings.Join(c, " "))
		}
		if got.String() != lines {
			t.Errorf("%s:\n%swant\n%s", goos, got.String(), lines)
		}
		if again := Commands(goos, "utun7", want, want); len(again) != 0 {
			t.Errorf("%s: what is in force is set again: %v", goos, again)
		}
	}
}

func TestParseRoutes(t *testing.T) {
	netstat := `Routing tables

Internet:
Destination        Gateway            Flags           Netif Expire
default            192.168.1.1        UGScg             en0
10.96/12           link#20            UCS             utun4
127                127.0.0.1          UCS               lo0
127.0.0.1          127.0.0.1          UH                lo0
169.254            link#6             UCS               en0      !
172.16/20          10.8.0.1           UGSc            utun3
192.168.1          link#6             UCS               en0      !
192.168.1.7        a4:83:e7:1:2:3     UHLWIi            en0   1186
224.0.0/4          link#6             UmCS              en0      !
255.255.255.255/32 link#6             UCS               en0      !

Internet6:
Destination                             Gateway                         Flags         Netif Expire
default                                 fe80::%utun0                    UGcIg         utun0
::1                                     ::1                             UHL             lo0
2001:db8:1::/64                         link#6                          UC              en0
fe80::%en0/64                           link#6                          UCI             en0
`
	windows := `[{"DestinationPrefix":"255.255.255.255/32","InterfaceAlias":"Ethernet"},{"DestinationPrefix":"0.0.0.0/0","InterfaceAlias":"Ethernet"},
		{"DestinationPrefix":"192.168.1.0/24","InterfaceAlias":"Ethernet"},{"DestinationPrefix":"10.0.0.0/8","InterfaceAlias":"VPN"},{"DestinationPrefix":"10.96.0.0/16","InterfaceAlias":"utun4"},
		{"DestinationPrefix":"fe80::/64","InterfaceAlias":"Ethernet"},{"DestinationPrefix":"ff00::/8","InterfaceAlias":"Ethernet"}]`
	for _, tt := range []struct{ goos, out, want string }{
		{"darwin", netstat, "[{172.16.0.0/20 utun3} {192.168.1.0/24 en0} {192.168.1.7/32 en0} {255.255.255.255/32 en0} {2001:db8:1::/64 en0}]"},
		{"windows", windows, "[{255.255.255.255/32 Ethernet} {192.168.1.0/24 Ethernet} {10.0.0.0/8 VPN}]"},
	} {
		got, err := ParseRoutes(tt.goos, "utun4", []byte(tt.out))
		if err != nil || fmt.Sprint(got) != tt.want {
			t.Errorf("%s: %v, %v", tt.goos, got, err)
		}
		if len(RoutesCommand(tt.goos)) == 0 {
			t.Errorf("%s: no command", tt.goos)
		}
	}
	for _, goos := range []string{"windows", "plan9"} {
		if _, err := ParseRoutes(goos, "x", []byte("nonsense")); err == nil {
			t.Errorf("%s: nonsense is read", goos)
		}
	}
}

func TestDevice(t *testing.T) {
	var ran []string
	var fails error
	d := NewDevice("darwin", "utun4", func(_ context.Context, argv []string, _ string) ([]byte, error) {
		ran = append(ran, strings.Join(argv, " "))
		return []byte("10.8/16 link#1 UCS en0\n10.9/16 link#2 UCS utun4\n"), fails
	})
	want := Settings{Addrs: prefixes("198.18.0.1/32"), Routes: prefixes("10.96.0.0/16")}
	for range 2 {
		if err := d.Apply(t.Context(), want); err != nil {
			t.Fatal(err)
		}
	}
	if got := strings.Join(ran, "; "); got != "ifconfig utun4 inet 198.18.0.1/32 198.18.0.1 alias; route -q -n add -inet 10.96.0.0/16 -interface utun4" {
		t.Errorf("ran %s", got)
	}
	if others, err := d.Others(t.Context()); err != nil || fmt.Sprint(others) != "[{10.8.0.0/16 en0}]" {
		t.Errorf("%v, %v", others, err)
	}
	fails = errors.New("exit status 1")
	if err := d.Apply(t.Context(), Settings{}); !errors.Is(err, fails) || !strings.Contains(err.Error(), "route -q -n delete") {
		t.Errorf("a program that fails: %v", err)
	}
	if _, err := d.Others(t.Context()); !errors.Is(err, fails) {
		t.Errorf("a program that fails: %v", err)
	}
}
